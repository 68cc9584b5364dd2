"""Launch files: shells read them, Kubernetes would, and the command in each is README's."""

import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

from jax._src.clusters import ClusterEnv, K8sCluster, cloud_tpu_cluster
import pytest
import yaml

from latentgen import main as command
from latentgen.config import load
from latentgen.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SHELL = sorted(LAUNCH.glob('*.sh'))
YAML = sorted(LAUNCH.glob('*.yaml'))
README = 'python -m latentgen.main --config=experiments/nvae_nce.py'
SLURM = [path for path in SHELL if path.name.startswith('slurm_')]
SBATCH = {  # options of sbatch(1) that are used, and what it takes for them
  'job-name': r'[\w-]+', 'nodes': r'\d+', 'ntasks': r'\d+', 'ntasks-per-node': r'\d+', 'gpus-per-node': r'\d+',
  'cpus-per-task': r'\d+', 'time': r'\d\d:\d\d:\d\d', 'array': r'\d+-\d+', 'requeue': '', 'open-mode': 'append|truncate',
  'signal': r'[A-Z]+@\d+',  # without B: to the steps, not to the script
}  # fmt: skip
JOBSET = {  # fields of a JobSet (v1alpha2) beside those of a Job: (all known, required)
  'spec': (
    {'coordinator', 'failurePolicy', 'managedBy', 'network', 'replicatedJobs', 'startupPolicy', 'successPolicy', 'suspend',
     'ttlSecondsAfterFinished'}, {'replicatedJobs'},
  ),
  'failurePolicy': ({'maxRestarts', 'restartStrategy', 'rules'}, set()),
  'rule': ({'action', 'name', 'onJobFailureReasons', 'targetReplicatedJobs'}, {'action', 'name'}),
  'replicatedJob': ({'dependsOn', 'groupName', 'name', 'replicas', 'template'}, {'name', 'template'}),
}  # fmt: skip


def name(path):
  return path.name


def documents(path):
  return list(yaml.safe_load_all(path.read_text()))


def jobs(path):
  """Job specifications of a file, a JobSet's included."""
  found = [d for d in documents(path) if d['kind'] in ('Job', 'JobSet')]
  return [r['template']['spec'] for d in found for r in d['spec'].get('replicatedJobs', [{'template': d}])]


def commands(path):
  """Words of every command of latentgen in a file."""
  if path.suffix == '.yaml':
    return [c['command'] for job in jobs(path) for c in job['template']['spec']['containers']]
  lines = [line for line in path.read_text().splitlines() if not line.startswith('#')]
  text = '\n'.join(lines).replace('\\\n', ' ')
  return [shlex.split(found.rstrip("'")) for found in re.findall(r'python -m latentgen\.main.*', text)]


def test_every_launch_file_is_looked_at():
  assert {p.suffix for p in LAUNCH.iterdir()} == {'.sh', '.yaml'} and len(SHELL) == 6 and len(YAML) == 2
  assert README in (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('path', SHELL, ids=name)
def test_shell_files_parse(path):
  done = subprocess.run([shutil.which('bash'), '-n', str(path)], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr
  assert path.read_text().startswith('#!/bin/bash\n')


@pytest.mark.parametrize('path', [p for p in SHELL + YAML if p.name != 'tpu_startup.sh'], ids=name)
def test_the_command_is_readmes_and_its_flags_are_known(path):
  found = commands(path)
  assert len(found) == 1 and found[0][:4] == shlex.split(README)
  flags, overrides = command.parse([re.sub(r'^(--sweep_index=)\$.*', r'\g<1>1', word) for word in found[0][3:]])
  file, config = load(str(ROOT / flags.config))
  assert not overrides
  if flags.sweep:
    members = command.sweep(file, flags.sweep, None)
    array = re.search(r'--array=0-(\d+)', (LAUNCH / 'slurm_sweep.sh').read_text())
    assert len(members) == int(array[1]) + 1
    assert (flags.mode == 'collect') == (flags.sweep_index is None)


@pytest.mark.parametrize('path', SLURM, ids=name)
def test_slurm_files_ask_for_what_they_use(path):
  text = path.read_text()
  options = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(.*))?$', text, re.M))
  assert {'job-name', 'nodes', 'time', 'cpus-per-task'} <= options.keys()
  assert len(options) == text.count('#SBATCH') and all(re.fullmatch(SBATCH[key], options[key]) for key in options)
  # Directives after the first command are comments to Slurm.
  assert text.rindex('#SBATCH') < text.index('\nset -')
  if '--mode=collect' in text:
    return
  assert {'requeue', 'open-mode', 'signal'} <= options.keys() and options['signal'].startswith('TERM@')
  assert 'scontrol requeue "$SLURM_JOB_ID"' in text and '-eq 143' in text and 'set -e' not in text
  # JAX gives the process with local index I the GPU I, and all GPUs to a process that is alone.
  if options['nodes'] == '1':
    assert options['ntasks'] == '1'
  else:
    assert options['ntasks-per-node'] == options['gpus-per-node'] and 'gpus-per-task' not in options


def test_slurm_jobs_requeue_themselves_when_stopped_and_only_then(tmp_path):
  for tool, body in {
    'srun': 'echo "$@" > srun.log; exit "$STATUS"', 'squeue': 'echo "$STATE"', 'scontrol': 'echo "$@" >> scontrol.log'
  }.items():  # fmt: skip
    (tmp_path / tool).write_text(f'#!/bin/bash\n{body}\n')
    (tmp_path / tool).chmod(0o755)
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  (tmp_path / '.venv' / 'bin' / 'activate').write_text('')
  for path in SLURM:
    if path.name == 'slurm_collect.sh':
      continue
    for status, state in ((143, 'RUNNING'), (143, 'COMPLETING'), (0, 'RUNNING'), (2, 'RUNNING')):
      (tmp_path / 'scontrol.log').write_text('')
      env = {
        'PATH': f'{tmp_path}:/usr/bin:/bin', 'STATUS': str(status), 'STATE': state,
        'SLURM_JOB_ID': '17', 'SLURM_ARRAY_TASK_ID': '1', 'SLURM_CPUS_PER_TASK': '4',
      }  # fmt: skip
      done = subprocess.run(['bash', str(path)], cwd=tmp_path, env=env, capture_output=True, text=True)
      assert done.returncode == status and not done.stderr and README in (tmp_path / 'srun.log').read_text()
      assert (tmp_path / 'scontrol.log').read_text() == ('requeue 17\n' if (status, state) == (143, 'RUNNING') else '')


@pytest.mark.parametrize(
  'ends, state, status, calls',
  [
    ('0', 'ACTIVE', 0, ['create', 'ssh', 'scp', 'ssh', 'delete']),  # done
    ('2', 'ACTIVE', 2, ['create', 'ssh', 'scp', 'ssh', 'delete']),  # bad input
    ('1', 'ACTIVE', 1, ['create', *['ssh', 'scp', 'ssh'] * 3, 'delete']),  # fails whenever it is started
    ('1 0', 'SUSPENDED', 0, ['create', 'ssh', 'scp', 'ssh', 'delete', 'create', 'ssh', 'scp', 'ssh', 'delete']),  # preempted
  ],
)
def test_a_tpu_slice_is_asked_for_until_the_run_is_done_and_given_back(tmp_path, ends, state, status, calls):
  (tmp_path / 'sleep').write_text('#!/bin/bash\n')
  (tmp_path / 'ends').write_text(ends)
  (tmp_path / 'gcloud').write_text(f"""#!/bin/bash
case $4 in
  describe) cat state; exit ;;
  create) echo ACTIVE > state ;;
  delete) echo > state ;;
esac
echo "$4" >> calls
if [[ "$*" == *latentgen.main* ]]; then
  read -r now later < ends
  echo "${{later:-$now}}" > ends
  [ "$now" -eq 0 ] || echo {state} > state
  exit "$now"
fi
""")
  for tool in ('sleep', 'gcloud'):
    (tmp_path / tool).chmod(0o755)
  (tmp_path / 'state').write_text('')
  env = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'ZONE': 'z', 'RUNS': 'host:/runs', 'STARTS': '3'}
  command = ['bash', str(LAUNCH / 'tpu_pod.sh')]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
  assert done.returncode == status, done.stderr
  assert (tmp_path / 'calls').read_text().split() == calls


@pytest.mark.parametrize('path', YAML, ids=name)
def test_kubernetes_objects_have_what_their_kind_requires(path):
  versions = {'Job': 'batch/v1', 'JobSet': 'jobset.x-k8s.io/v1alpha2', 'Service': 'v1', 'PersistentVolumeClaim': 'v1'}
  for document in documents(path):
    assert document['apiVersion'] == versions[document['kind']]
    assert re.fullmatch(r'[a-z0-9]([a-z0-9-]*[a-z0-9])?', document['metadata']['name']) and document['spec']
  for job in jobs(path):
    pod = job['template']['spec']
    assert job['completionMode'] == 'Indexed' and job['completions'] == job['parallelism']
    assert pod['restartPolicy'] == 'Never'  # as podFailurePolicy wants it
    (container,) = pod['containers']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    for rule in job['podFailurePolicy']['rules']:
      assert rule['action'] in ('FailJob', 'Ignore') and len(rule) == 2
      if 'onExitCodes' in rule:
        assert rule['onExitCodes']['containerName'] == container['name'] and 0 not in rule['onExitCodes']['values']
      for condition in rule.get('onPodConditions', ()):
        assert condition == {'type': 'DisruptionTarget', 'status': 'True'}


def test_a_jobset_has_fields_that_exist_and_none_too_few():
  (found,) = documents(LAUNCH / 'gke_jobset.yaml')
  spec, policy = found['spec'], found['spec']['failurePolicy']
  parts = [('spec', spec), ('failurePolicy', policy), *(('rule', r) for r in policy['rules'])]
  parts += [('replicatedJob', r) for r in spec['replicatedJobs']]
  for kind, part in parts:
    known, required = JOBSET[kind]
    assert required <= part.keys() <= known, kind
  for rule in policy['rules']:
    assert rule['action'] in ('FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts')
    assert re.fullmatch('[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
    assert rule['onJobFailureReasons'] == ['PodFailurePolicy']  # why a Job fails whose podFailurePolicy has FailJob


def test_processes_of_a_kubernetes_job_find_each_other():
  path = LAUNCH / 'kubernetes_job.yaml'
  kinds = {d['kind']: d for d in documents(path)}
  (job,) = jobs(path)
  pod = job['template']['spec']
  (container,) = pod['containers']
  env = {e['name']: e.get('value') for e in container['env']}
  service = kinds['Service']['metadata']['name']
  assert pod['subdomain'] == service and kinds['Service']['spec']['clusterIP'] == 'None'
  assert kinds['Service']['spec']['selector'] == {'job-name': kinds['Job']['metadata']['name']}
  host, port = kinds['Job']['metadata']['name'] + '-0', container['ports'][0]['containerPort']
  assert env['JAX_COORDINATOR_ADDRESS'] == f'{host}.{service}:{port}'
  assert int(env['JAX_NUM_PROCESSES']) == job['completions']
  assert len(env['JAX_LOCAL_DEVICE_IDS'].split(',')) == container['resources']['limits']['nvidia.com/gpu']
  (index,) = [e['valueFrom']['fieldRef']['fieldPath'] for e in container['env'] if e['name'] == 'JAX_PROCESS_ID']
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  codes = [(r['action'], r['onExitCodes']['values']) for r in job['podFailurePolicy']['rules'] if 'onExitCodes' in r]
  assert codes == [('FailJob', [2]), ('Ignore', [143])]


# ---------------------------------------------------------------------------------------------- --distributed=auto

SLURM_STEP = {
  'SLURM_JOB_ID': '17', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0',
}  # fmt: skip
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '0',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}  # fmt: skip
TPU = {'TPU_SKIP_MDS_QUERY': 'true', 'TPU_WORKER_ID': '0'}  # of a container that GKE gives TPUs
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0', 'HOSTNAME': 'localhost'}


@pytest.fixture
def place(monkeypatch):
  """(environment, pods of this pod's Job) -> (what `auto` decides there, the processes that jax itself finds)."""
  for variable in os.environ:
    if variable.startswith(('SLURM_', 'OMPI_', 'JAX_NUM', 'TPU_', 'MEGASCALE_', 'KUBERNETES_', 'JOB_COMPLETION')):
      monkeypatch.delenv(variable)

  def decide(env, pods=None):
    job = SimpleNamespace(spec=SimpleNamespace(parallelism=pods))
    with monkeypatch.context() as patch:
      for variable, value in env.items():
        patch.setenv(variable, value)
      patch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', TPU.items() <= env.items())
      patch.setattr(cloud_tpu_cluster, 'get_metadata', lambda key: ('', 404))
      if pods:
        patch.setattr(K8sCluster, 'is_env_present', classmethod(lambda cls: 'KUBERNETES_SERVICE_HOST' in env))
        patch.setattr(K8sCluster, '_job', classmethod(lambda cls: job))
      kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
      found = next((kind for kind in kinds if kind.is_env_present()), None)
      return command.cluster(), found and found.get_process_count()

  return decide


@pytest.mark.parametrize(
  'env, pods, processes',
  [
    ({}, None, None),
    ({'SLURM_NTASKS': '16', 'SLURM_JOB_ID': '17'}, None, None),  # a batch script; its srun starts the processes
    (SLURM_STEP, None, 2),  # slurm_nodes.sh, under srun
    ({**SLURM_STEP, 'SLURM_NTASKS': '1'}, None, 1),  # slurm_node.sh: one process drives all GPUs
    (OPEN_MPI, None, 2),
    ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, None, 1),
    ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a,b,c,d', **POD}, None, 4),  # gke_jobset.yaml, put there by GKE
    ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a', **POD}, None, 1),
    ({**TPU, 'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, None, 2),
    ({**TPU, 'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_COORDINATOR_ADDRESS': 'a', 'MEGASCALE_NUM_SLICES': '2'}, None, 2),
    (POD, 4, 4),  # an indexed Job or JobSet
    (POD, 1, 1),
  ],
)  # fmt: skip
def test_auto_decides_as_jax_counts(place, env, pods, processes):
  assert place(env, pods) == (processes is not None and processes > 1, processes)


def test_auto_goes_by_jax_variables_first_and_leaves_pods_of_no_indexed_job_alone(place):
  assert place({'JAX_NUM_PROCESSES': '2'})[0]  # kubernetes_job.yaml
  assert place({**POD, 'JAX_NUM_PROCESSES': '2'}, 1)[0]
  assert not place({**SLURM_STEP, 'JAX_NUM_PROCESSES': '1'})[0]
  assert not place({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, 4)[0]


def test_kubernetes_without_leave_to_ask_it_is_said(place, monkeypatch):
  refuse = lambda cls: (_ for _ in ()).throw(RuntimeError('the service account\nmay not read pods'))
  with monkeypatch.context() as patch:
    patch.setattr(K8sCluster, 'get_process_count', classmethod(refuse))
    with pytest.raises(UserError, match='may not read pods.*set JAX_COORDINATOR_ADDRESS.*or --distributed=off'):
      place(POD, 4)
  monkeypatch.setitem(sys.modules, 'kubernetes', None)
  with pytest.warns(UserWarning, match='`kubernetes` package is not\\s+installed'):
    assert not place(POD)[0]


def test_the_tpu_script_says_that_it_is_one_of_several():
  (words,) = commands(LAUNCH / 'tpu_pod.sh')
  assert command.parse(words[3:])[0].distributed == 'on'  # nothing in its environment says so


@pytest.mark.slow
@pytest.mark.parametrize('env, rank', [(SLURM_STEP, 'SLURM_PROCID'), (OPEN_MPI, 'OMPI_COMM_WORLD_RANK')], ids=['slurm', 'mpi'])
def test_two_processes_of_a_launcher_join(env, rank):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = str(s.getsockname()[1])
  program = "from latentgen import main; main.start_jax('auto'); import jax; print(jax.process_index(), jax.process_count())"
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src'), 'JAX_COORDINATOR_PORT': port, **env}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  pair = [subprocess.Popen([sys.executable, '-c', program], env={**env, rank: str(i)}, **pipes) for i in range(2)]
  try:
    said = [process.communicate(timeout=120) for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert [out.split() for out, _ in said] == [['0', '2'], ['1', '2']], said


def test_a_distributed_run_that_nothing_describes_is_refused(place):
  place({})  # leaves nothing in the environment
  done = subprocess.run(
    [sys.executable, '-m', 'latentgen.main', '--config=experiments/vae_nce.py:smoke', '--distributed=on'], cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT / 'src')}, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'set JAX_COORDINATOR_ADDRESS' in done.stderr
