"""Facts of a run, and its utilization."""

import json
import subprocess

import pytest
import torch

from weft.config.errors import RunError
from weft.train.environment import environment
from weft.train.flops import measure_peak, utilization


def test_facts_are_plain_and_say_the_versions():
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    assert facts["device"] == "cpu"
    json.dumps(facts, allow_nan=False)


def test_the_commit_and_local_changes_are_named(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "a.py"
    source.write_text("1")
    assert "commit" not in environment(source=source)
    git("init")
    git("add", "a.py")
    git("commit", "-m", "first")
    commit = environment(source=source)["commit"]
    assert len(commit) == 40
    source.write_text("2")
    assert environment(source=source)["commit"] == f"{commit} with local changes"
    (tmp_path / "new.py").write_text("")
    assert "commit" not in environment(source=tmp_path / "new.py")  # an installed copy inside another project


def test_utilization():
    assert utilization(1000.0, 6e6, 2.4e10) == pytest.approx(0.25)
    for peak in (0.0, -1.0, float("nan")):
        with pytest.raises(RunError, match=r"set logger\.peak_flops"):
            utilization(1.0, 1.0, peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_peak_of_this_machine_is_plausible(dtype):
    assert 1e8 < measure_peak(torch.device("cpu"), dtype, seconds=0.0) < 1e15
