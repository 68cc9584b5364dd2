"""What went wrong outside the program, and how it is said."""

from collections.abc import Iterable
import difflib

LONGEST = 1000  # characters of a message


class UserError(Exception):
  """Bad input: one line that names the config key or the file, and the remedy.

  The command line prints it without a traceback and exits with status 2. Of a very long message, which repeats a very long
  value, the middle is left out.
  """

  def __init__(self, message: str):
    text = ' '.join(str(message).split())
    super().__init__(text if len(text) <= LONGEST else f'{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}')


def did_you_mean(word: object, known: Iterable[str]) -> str:
  """'; did you mean "x"?' for the nearest of the known words, '' if none is near. Goes into a `UserError`."""
  near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
  return f'; did you mean {near[0]!r}?' if near else ''


def near(word: object, known: Iterable[str]) -> str:
  """'; did you mean "x"?' for the nearest of the known words, else '; known: ...'."""
  known = sorted(str(k) for k in known)
  return did_you_mean(word, known) or f'; known: {", ".join(known) or "none"}'


def one_line(error: BaseException, longest: int = 300) -> str:
  """What kind of error it is and the beginning of what it says. Goes into a `UserError`."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:longest]}'


class TrainingDiverged(Exception):
  """A loss, metric or gradient was not finite: says which, where, and what to try. Exit status 1."""


class Damaged(UserError):
  """A checkpoint that cannot be read, though its shapes are not known to be wrong."""


class SaveFailed(Exception):
  """A checkpoint could not be written: says which, and why. Exit status 1."""


class Preempted(Exception):
  """SIGTERM came; everything is saved. Exit status 143, upon which schedulers start the command again."""
