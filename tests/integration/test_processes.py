"""Two processes, as accelerate launch and torchrun start them, write one soup: the bytes of a single process."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import files_here, make_plan
from safetensors.torch import load_file, save_file

from hf_soup.checkpoint import read_header
from hf_soup.demo import child_environment
from hf_soup.errors import RecipeError
from hf_soup.hub import client
from hf_soup.local_hub import LocalHub
from hf_soup.merging import BLOCK_BYTES, Workspace, merge, plan as plan_module
from hf_soup.recipe import Recipe
from hf_soup.workflows.cook import cook

# Python runs this file at its start in every process: it tells, from outside, which process opened a journal to write,
# or the weights of an ingredient to average or to hash them.
WITNESS = """
import os, sys

def hook(event, arguments):
    if event != "open" or isinstance(arguments[0], int):
        return
    folder, name = os.path.split(os.fspath(arguments[0]))
    read = name == "model.safetensors" and arguments[1] is None and not folder.endswith("soup")
    if read or (name.startswith("journal.") and arguments[1] == "a"):
        rank = os.environ.get("RANK", "alone")
        os.write(2, f"\\nWITNESS {rank} {os.path.basename(folder) if read else name}\\n".encode())

sys.addaudithook(hook)
"""
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
#: Says what a launcher told a process, in one piece.
TOLD = """
import os
names = ("WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "RANK")
os.write(1, (" ".join(os.environ[name] for name in names) + "\\n").encode())
"""
#: One process dies by SIGKILL after its first block; the other reports what it can.
DYING = """
import os, pickle, signal, sys
from pathlib import Path
from hf_soup.merging import plan as plan_module
from hf_soup.errors import MergeError
from hf_soup.local_hub import LocalHub
from hf_soup.merging import merge
from hf_soup.merging import Workspace
from hf_soup.merging.weight_files import WeightFiles
from hf_soup.merging.processes import process_group

plan_module.UNIT_BYTES = 4 << 20
here = process_group()
staging = Workspace(Path("soup"))
note = staging.note

def noting(rank, entries):
    note(rank, entries)
    if entries and rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

staging.note = noting
plan, supply = pickle.loads(Path("job").read_bytes())
try:
    with staging.join(plan.fingerprint, here.rank):
        merge(plan, supply, staging, world=here, threads=1, quiet=True)
except MergeError as error:
    print("SAID", here.rank, error.message, flush=True)
"""

#: Cooks in this process with a forward pass of a model counted, or deadly for one of the processes.
COUNTING = """
import os, signal, sys
import torch
from hf_soup.cli.app import main

rank, dies, passes = int(os.environ.get("RANK", 0)), sys.argv[1], 0

def count(module, *_):
    global passes
    if type(module).__name__ == "BertForSequenceClassification":
        passes += 1
        if dies == str(rank) and passes == 3:
            os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_hook(count)
try:
    main(sys.argv[2:])
finally:
    print("PASSES", rank, passes, file=sys.stderr, flush=True)
"""

#: A program of several processes, which has made its own connections, and then cooks.
PROGRAM = """
import os, sys, time
from pathlib import Path
from accelerate import Accelerator
from hf_soup import SoupError, cook
from hf_soup.merging import processes as world

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index

def told(out, **options):
    try:
        soup = cook(recipe, out, **options)
    except SoupError as error:
        print("SAID", rank, error.message, flush=True)
    else:
        ready = (soup.folder / "soup.json").exists()
        print("SOUP", rank, soup.digest, len(soup.weights), ready, flush=True)

"""

#: Goes the whole way without what Linux alone has; libraries were imported before, hf_soup was not.
MAC = """
import ctypes, os, sys

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("renameat2", "prctl"):
            raise AttributeError(name)
        return super().__getattr__(name)

def hook(event, arguments):
    if event == "os.fork" or event == "open" and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(event)

sys.addaudithook(hook)
ctypes.CDLL, sys.platform = Library, "darwin"
for name in dir(os):
    if name.startswith(("sched_", "posix_fa", "POSIX_FA", "RWF_", "memfd", "MFD_", "pidfd", "copy_file", "O_TMPFILE")):
        delattr(os, name)
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_soup"]:
    del sys.modules[name]

from hf_soup.cli import app as cli; from hf_soup.merging import workers

workers._WORTH = 0
for command in (
    ["check", "--recipe", "recipe.yaml"], ["cook", "recipe.yaml", "--dry-run", "-o", "soup"],
    ["cook", "recipe.yaml", "-o", "soup"], ["push", "soup", "acme/soup"],
):
    try:
        cli.main(command)
    except SystemExit as stop:
        assert not stop.code, command
"""

#: Has imported what cooking needs, and forks into the processes of each job that comes as a line: two, without the
#: eight seconds of imports that each would begin with.
READY = """
import json, os, runpy, sys, tempfile, traceback
import accelerate, datasets, matplotlib.backends.backend_agg, matplotlib.figure, sklearn.metrics, torch, transformers
from huggingface_hub import constants
from transformers import BertForSequenceClassification, BertTokenizer
import hf_soup.cli, hf_soup.workflows.cook

def become(job, rank):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{rank}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    tempfile.tempdir = None
    constants.HF_HOME = os.environ["HF_HOME"]  # it was read when the client was imported
    constants.HF_HUB_CACHE = os.path.join(constants.HF_HOME, "hub")
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    sys.addaudithook(runpy.run_path("sitecustomize.py")["hook"])
    sys.argv = job["command"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0

for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in range(job["count"]):
        if not (pid := os.fork()):
            code = 1
            try:
                code = become(job, rank)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""

Cli = Callable[..., Any]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Launch:
    """Runs ``LAUNCHER MODULE_OR_FILE ARGUMENTS``, watched by the witness."""
    (tmp_path / "sitecustomize.py").write_text(WITNESS)

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        env = {**environment, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}", **changes}
        with subprocess.Popen(
            command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as child:  # fmt: skip
            try:
                out, err = child.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    return run


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    home = tmp_path_factory.mktemp("ready")
    env = child_environment(os.environ, home, "http://127.0.0.1:9", "") | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        [sys.executable, "-c", READY], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:  # fmt: skip
        yield parent
        os.killpg(parent.pid, signal.SIGKILL)


@pytest.fixture
def together(ready: subprocess.Popen[str], environment: dict[str, str], tmp_path: Path) -> Launch:
    """Runs ``FILE ARGUMENTS`` in several processes, where it is not the launcher that is looked at."""
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    assert ready.stdin is not None
    assert ready.stdout is not None

    def run(*command: object, count: int = 2, **changes: str) -> subprocess.CompletedProcess[str]:
        # As torchrun does, so that the processes find each other also where the first one dies.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        env = {**environment, **world, "TORCHELASTIC_USE_AGENT_STORE": "True", **changes}
        job = {"folder": str(tmp_path), "command": [*map(str, command)], "env": env, "count": count}
        ready.stdin.write(json.dumps(job) + "\n")
        ready.stdin.flush()
        if not select.select([ready.stdout], [], [], 100)[0]:
            os.killpg(ready.pid, signal.SIGKILL)
        codes = json.loads(ready.stdout.readline())
        out, err = (
            "".join((tmp_path / f"{rank}.{name}").read_text() for rank in range(count)) for name in ("out", "err")
        )
        return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), out, err)

    return run


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def ingredients(family: Path) -> list[object]:
    return [*(family / name for name in "abc"), "--base", family / "base", "--quiet"]


@pytest.fixture(scope="module")
def alone(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The soup that one process makes."""
    recipe = Recipe(ingredients=[str(family / name) for name in "abc"], base_model=str(family / "base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "ATTEMPTS", 1)  # there is no Hub that knows what the cards name
        return cook(recipe, tmp_path_factory.mktemp("alone") / "soup").folder


def test_two_processes_write_the_bytes_of_one(launch: Launch, family: Path, alone: Path, tmp_path: Path) -> None:
    """Both of them work, one of them speaks."""
    command = ["-m", "hf_soup", "cook", *ingredients(family), "-o", "soup", "--json"]
    done = launch(*ACCELERATE, *command, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    # There is one unit, for the first, and the other hashes the second of three folders whose sha256 is not known.
    assert set(re.findall(r"WITNESS (.*)", done.stderr)) == {"0 journal.0", "0 a", "0 b", "0 c", "1 b"}
    answer = done.stdout[done.stdout.index("{") :]  # some releases of torch say there that processes are connected
    assert json.loads(answer)["digest"] == json.loads((alone / "soup.json").read_text())["digest"]
    assert weights(tmp_path / "soup") == weights(alone)
    # The processes divided the files whose sha256 was not known, and the recipe has them all; the seed shows nowhere.
    for name in ("soup.json", "soup.yaml", "config.json", "README.md"):
        assert (tmp_path / "soup" / name).read_bytes() == (alone / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir() if "soup" in path.name) == ["soup"]


def test_torchrun_tells_processes_what_they_need(launch: Launch, tmp_path: Path) -> None:
    """No less than `together` tells them, with which they find each other and cook."""
    (tmp_path / "told.py").write_text(TOLD)
    done = launch(*TORCHRUN, "told.py")
    assert done.returncode == 0, done.stderr
    first, second = sorted(line.split() for line in done.stdout.splitlines())
    assert first[:2] == ["2", "True"]
    assert first[:4] == second[:4]
    assert (first[4:], second[4:]) == (["0", "0"], ["1", "1"])


@pytest.fixture
def greedy(family: Path, trained: Path, tmp_path: Path) -> Path:
    """A recipe that scores: 24 rows of validation data and 24 of a report, five in a batch."""
    data = {"task": "text-classification", "batch_size": 5}
    recipe = {
        "base_model": str(family / "base"),
        "ingredients": [str(trained / name) for name in ("poor", "fair", "good")],
        "select": "greedy",
        "validation": {**data, "dataset": str(family / "rows.csv")},
        "test": [{**data, "dataset": str(family / "report.csv"), "name": "test"}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "counting.py").write_text(COUNTING)
    return tmp_path / "recipe.yaml"


def test_two_processes_share_the_batches(together: Launch, greedy: Path, tmp_path: Path) -> None:
    """Each answers about half of them, and the soup and all that is said of it is what one process makes."""
    command = ["none", "cook", greedy, "--quiet", "-o"]
    alone = together("counting.py", *command, "one", count=1, HF_HOME=str(tmp_path / "one-home"))
    assert alone.returncode == 0, alone.stderr
    done = together("counting.py", *command, "two", HF_HOME=str(tmp_path / "two-home"))
    assert done.returncode == 0, done.stderr
    for name in ("soup.json", "soup.yaml", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    counted = {rank: int(passes) for rank, passes in re.findall(r"PASSES (\d) (\d+)", done.stderr)}
    total = int(re.findall(r"PASSES 0 (\d+)", alone.stderr)[0])
    assert counted == {"0": total * 3 // 5, "1": total * 2 // 5}  # of five batches, three and two
    notes = [
        {path.name: path.read_bytes() for path in (tmp_path / home / "hf-soup" / "logits").iterdir()}
        for home in ("one-home", "two-home")
    ]
    assert notes[0] == notes[1]


def test_a_function_is_called_by_the_first_process_alone(together: Launch, family: Path, tmp_path: Path) -> None:
    (tmp_path / "own_of_processes.py").write_text(
        "import os\n\n\ndef score(model):\n"
        "    print('CALLED', os.environ.get('RANK', '0'), flush=True)\n"
        "    return [float(each.norm()) for each in model.parameters()]\n"
    )
    (tmp_path / "counting.py").write_text(COUNTING)
    command = ["cook", family / "a", family / "b", "--select", "greedy", "--validation", "own_of_processes:score", "-o"]
    for count, name in ((1, "one"), (2, "two")):
        done = together("counting.py", "none", *command, name, "--quiet", count=count)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"CALLED (\d)", done.stderr)) == {"0"}
    for name in ("soup.json", "soup.yaml", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_two_processes_read_texts(together: Launch, language_family: Path, tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    models = [language_family / name for name in ("one", "two", "poor")]
    command = ["cook", *models, "--base", language_family / "base", "--select", "greedy", "--task", "causal-lm"]
    command += ["--data", language_family / "validation.jsonl", "--quiet", "-o"]
    for count, name in ((1, "one"), (2, "two")):
        done = together("counting.py", "none", *command, name, count=count, HF_HOME=str(tmp_path / f"{name}-home"))
        assert done.returncode == 0, done.stderr
    for name in ("soup.json", "soup.yaml", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.fixture
def program(family: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a program of several processes that cooks."""

    def write(text: str, models: Sequence[Path] = ()) -> str:
        models = models or [family / name for name in "abc"]
        recipe = {"ingredients": [str(model) for model in models], "base_model": str(family / "base")}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        (tmp_path / "program.py").write_text(f"{PROGRAM}recipe = 'recipe.yaml'\n{text}")
        return "program.py"

    return write


def test_every_process_has_the_finished_soup(together: Launch, program: Callable[..., str], alone: Path) -> None:
    """Or the error of the first one, after which the same processes cook again."""
    done = together(program("told('.')\ntold('soup')\naccelerator.wait_for_everyone()"), count=3)
    assert done.returncode == 0, done.stderr
    digest = json.loads((alone / "soup.json").read_text())["digest"]
    for rank in range(3):
        assert f"SAID {rank} The output '.' exists already" in done.stdout
        assert f"SOUP {rank} {digest} 3 True\n" in done.stdout


def test_an_error_of_one_process_is_that_of_all(
    together: Launch, program: Callable[..., str], family: Path, tmp_path: Path
) -> None:
    """Here a number that is none, in the half of the second one; at the command line it is said once."""
    model = tmp_path / "broken"
    shutil.copytree(family / "a", model)
    tensors = load_file(model / "model.safetensors")
    tensors["bert.pooler.dense.bias"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    line = "from hf_soup.cli.app import main\nmain(['cook', recipe, '-o', 'line', '--quiet'])"
    done = together(program(f"told('soup')\n{line}", [model, family / "b"]))
    assert done.returncode == 1
    errors = re.findall(r"SAID (\d) (.*)", done.stdout)
    assert {rank for rank, _ in errors} == {"0", "1"}
    assert len({message for _, message in errors}) == 1
    assert "bert.pooler.dense.bias" in errors[0][1]
    assert re.findall("Error: (.*)", done.stderr) == [errors[0][1]]


def test_a_defect_of_one_process_is_an_error_of_the_others(together: Launch, program: Callable[..., str]) -> None:
    done = together(program("recipe = 3 if rank == 0 else recipe\ntold('soup')"))
    assert "SAID 1 Process 0 of those that work together failed: TypeError" in done.stdout
    assert "TypeError" in done.stderr


def test_the_main_process_cooks_alone(together: Launch, program: Callable[..., str], alone: Path) -> None:
    """It waits for no other."""
    text = "if accelerator.is_main_process: told('soup', processes='main')\naccelerator.wait_for_everyone()"
    done = together(program(text))
    assert done.returncode == 0, done.stderr
    digest = json.loads((alone / "soup.json").read_text())["digest"]
    assert re.findall(r"SOUP .*", done.stdout) == [f"SOUP 0 {digest} 3 True"]


def test_one_that_waits_for_others_says_so(together: Launch, program: Callable[..., str]) -> None:
    """The other comes when it was said."""
    text = """
world._SAID_AFTER = 0.01
if rank:
    while not Path("said").exists(): time.sleep(0.01)
import logging

class Said(logging.Handler):
    def emit(self, record):
        if "waiting for" in record.getMessage():
            Path("said").touch()

logging.getLogger("hf_soup").setLevel(logging.INFO)
logging.getLogger("hf_soup").addHandler(Said())
told("soup")
"""
    done = together(program(text))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True\n") == 2


def test_one_that_waits_for_others_hears_signals(together: Launch, program: Callable[..., str], tmp_path: Path) -> None:
    """The second one waits for the first, which is still busy."""
    text = """
import signal, threading
import hf_soup.workflows.cook

def busy(*_, **__):
    Path("busy").touch()
    while not Path("heard").exists(): time.sleep(0.01)
    os._exit(0)

def interrupt():
    while not Path("busy").exists(): time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

if rank == 0:
    hf_soup.workflows.cook.checked_models = busy
else:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
try:
    cook(recipe, "soup")
except KeyboardInterrupt:
    Path("heard").touch()
    os._exit(0)
"""
    done = together(program(text))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heard").exists()


def test_nothing_needs_what_linux_alone_has(
    together: Launch, publish: Callable[..., str], local_hub: LocalHub, family: Path, tmp_path: Path
) -> None:
    """From check to push, with scores, as on a Mac."""
    for name in ("base", "a", "b"):
        publish(name)
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    recipe = {"ingredients": ["acme/a", "acme/b"], "select": "greedy", "validation": data}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "mac.py").write_text(MAC)
    done = together("mac.py", count=1)
    assert done.returncode == 0, done.stderr
    assert local_hub.store.find("model", "acme/soup")


def test_who_cooks_is_all_or_main(family: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`processes` is 'first'; it is `all` or `main`"):
        cook([str(family / "a")], tmp_path / "soup", processes="first")  # type: ignore[arg-type]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_while_it_scores_ends_the_other(
    together: Launch, greedy: Path, tmp_path: Path, dies: int
) -> None:
    done = together("counting.py", dies, "cook", greedy, "-o", "soup", "--quiet")
    assert done.returncode != 0
    assert "Error: Another of the processes that work together has ended early." in done.stderr
    assert f"PASSES {1 - dies}" in done.stderr
    assert not (tmp_path / "soup").exists()


def test_a_model_that_cannot_be_scored_is_one_error(
    together: Launch, greedy: Path, trained: Path, tmp_path: Path
) -> None:
    """All processes meet it; the first one says it, and the other ends too."""
    shutil.copytree(trained / "fair", tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["bert.pooler.dense.bias"][:] = 10.0
    tensors["classifier.weight"][:] = 3e38  # finite, but the sum of them is not
    save_file(tensors, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    greedy.write_text(greedy.read_text().replace(str(trained / "fair"), str(tmp_path / "c")))
    done = together("counting.py", "none", "cook", greedy, "-o", "soup", "--quiet")
    assert done.returncode != 0
    assert done.stderr.count("Error: local:c: The model's output for row ") == 1
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("command", ["score", "check", "cook"])
def test_what_is_for_one_process_is_refused_in_several(
    cli: Cli, greedy: Path, family: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of them, before it looks for the others."""
    arguments = {
        "score": [family / "a", "--recipe", greedy],
        "check": ["--recipe", greedy, "--barrier"],
        "cook": [*ingredients(family), "-o", "soup", "--stream"],
    }
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is for one process, and there are 2." in cli(command, *arguments[command]).err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "Error: WORLD_SIZE is 'two', which is no number of processes." in cli(command, *arguments[command]).err
    assert not list(tmp_path.glob("*soup*"))


def test_processes_that_nobody_launched_are_one_clear_error(
    cli: Cli, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are announced, one is there: it does not wait for the other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("cook", *ingredients(family), "-o", "soup")
    assert done.code == 1
    assert done.err.startswith("Error: WORLD_SIZE is 2, but no launcher set RANK, LOCAL_RANK, MASTER_ADDR")
    assert "torchrun --nproc-per-node" in done.err
    assert not list(tmp_path.glob("*soup*"))


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_leaves_what_is_finished(
    together: Launch, tmp_path: Path, dies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one says so instead of waiting; the same command continues, here with a single process."""
    paths, headers = [], []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"t{i}": torch.full((1 << 21,), number + i / 8, dtype=torch.bfloat16) for i in range(6)}, path)
        data = path.read_bytes()
        headers.append({t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")})
        paths.append({"m": path})
    plan = make_plan(["a@0", "b@0"], headers, [0.3, 0.9])
    with Workspace(tmp_path / "soup") as staging:
        staging.open(plan.fingerprint, plan.outline())
    monkeypatch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
    (tmp_path / "job").write_bytes(pickle.dumps((plan, files_here(paths))))
    (tmp_path / "dying.py").write_text(DYING)
    done = together("dying.py", dies)
    assert done.returncode != 0
    assert f"SAID {1 - dies} Another of the processes that work together has ended early." in done.stdout, done.stderr
    with Workspace(tmp_path / "soup") as staging:
        assert staging.open(plan.fingerprint, plan.outline()) == "continued"
        merged = merge(plan, files_here(paths), staging, threads=1, quiet=True)
        staging.publish()
    assert merged.resumed == 4 * BLOCK_BYTES  # three of the living one, one of the other
    with Workspace(tmp_path / "fresh") as staging:
        staging.open(plan.fingerprint, plan.outline())
        assert merge(plan, files_here(paths), staging, threads=1, quiet=True).digest == merged.digest


@pytest.mark.parametrize(
    "how",
    [
        {"method": {"name": "fisher", "examples": 8}}, {"select": {"name": "entropy", "steps": 3, "examples": 8}},
    ],
    ids=str,
)  # fmt: skip
def test_one_process_looks_at_examples_for_all(
    together: Launch, greedy: Path, family: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    """The first collects, both read what it found; the soup is what one process makes."""
    recipe = json.loads(greedy.read_text())
    del recipe["select"], recipe["validation"], recipe["test"]
    recipe |= how
    recipe["calibration"] = {"task": "text-classification", "dataset": str(family / "rows.csv"), "batch_size": 2}
    greedy.write_text(json.dumps(recipe))
    command = ["none", "cook", greedy, "--quiet", "-o"]
    alone = together("counting.py", *command, "one", count=1, HF_HOME=str(tmp_path / "one-home"))
    assert alone.returncode == 0, alone.stderr
    done = together("counting.py", *command, "two", HF_HOME=str(tmp_path / "two-home"))
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"WITNESS (. journal.*)", done.stderr)) == {"0 journal.0", "1 journal.1"}
    for name in ("soup.json", "soup.yaml", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_one_process_collects_the_statistics_of_batch_norms(together: Launch, resnets: Path, tmp_path: Path) -> None:
    """Of each candidate and of the soup; both score with what it found."""
    data = {"task": "image-classification"}
    recipe = Recipe(
        ingredients=[str(resnets / "run" / f"checkpoint-{step}") for step in (40, 50, 60)],
        select="greedy",
        calibration={**data, "dataset": str(resnets / "train.parquet"), "batch_size": 64},
        validation={**data, "dataset": str(resnets / "validation.parquet")},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "counting.py").write_text(COUNTING.replace("BertForSequence", "ResNetForImage"))
    cook(recipe, tmp_path / "one")
    done = together("counting.py", "none", "cook", "recipe.yaml", "--quiet", "-o", "two")
    assert done.returncode == 0, done.stderr
    for name in ("soup.json", "soup.yaml", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    counted = {rank: int(passes) for rank, passes in re.findall(r"PASSES (\d) (\d+)", done.stderr)}
    assert counted["0"] - counted["1"] >= 3 * 4  # two candidates and the soup, four batches each
