"""ek.shard: members in several processes (gloo) give what the whole ensemble gives; see sharding_checks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from common import ROOT
from sharding_checks import CHECKS, PROCESSES, close, make
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

TIMEOUT = 1200  # seconds: processes share the machine with whatever else runs


@pytest.fixture(scope="module")
def processes(tmp_path_factory, request):
    """The folder of four processes that have run all checks, started once."""
    folder = tmp_path_factory.mktemp("sharding")
    seed = str(request.config.option.seed)
    command = [sys.executable, "tests/sharding_checks.py"]
    workers = []
    for rank in range(PROCESSES):
        with (folder / f"{rank}.log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            arguments = [*command, str(rank), str(folder), seed]
            workers.append(subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log, env=environment))
    try:
        for worker in workers:
            worker.wait(timeout=TIMEOUT)
    finally:
        for worker in workers:
            worker.kill()
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(name, processes):
    count, _ = CHECKS[name]
    for rank in range(count):
        path = processes / f"{rank}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        said = done.get(name, "not reached")
        log = "".join((processes / f"{rank}.log").read_text().splitlines(keepends=True)[-20:])
        assert not said, f"process {rank} of {count}: {said}\n{log}"


def test_checkpoint_of_two_processes_in_one(processes):
    """torch.distributed.checkpoint: whole tensors, whoever saved them; the optimizer's too."""
    expected = torch.load(processes / "expected.pt", weights_only=False)
    ensemble = make("layers", 3)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.01)
    state = dict(zip(("model", "optimizer"), get_state_dict(ensemble, optimizer)))
    dcp.load(state, checkpoint_id=processes / "by two", no_dist=True)
    set_state_dict(ensemble, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for name, t in ensemble.state_dict().items():
        close(t, expected["model"][name])
    found = get_state_dict(ensemble, optimizer)[1]["state"]
    assert list(found) == list(expected["optimizer"]["state"])
    for name, values in found.items():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            close(values[kind], expected["optimizer"]["state"][name][kind])
