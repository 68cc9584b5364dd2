"""Training dynamics as pure functions: what a step shares, which updates it makes, how the result is sampled."""
