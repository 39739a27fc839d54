"""How quiet the machine was: what is read, when it is too busy, and what is not written then."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.formatting import ceiling_text
from jaxgpt_bench.common.rows import Noise, Spread
from jaxgpt_bench.noise.meter import NoiseMeter, cpu_time, own_cpu_seconds
from jaxgpt_bench.noise.verdict import (
    OTHERS_CPU_SHARE,
    PROBE_SPREAD,
    STOLEN_SHARE,
    is_refused,
    noises_in,
    reasons,
    warn,
)
from jaxgpt_bench.pages.command import judge_noise
from jaxgpt_bench.serving import launcher
from jaxgpt_bench.serving.servers import cpu_seconds_beside, ended_with_us
from jaxgpt_bench.speed.command import check
from jaxgpt_bench.speed.contestants import Contestant, own_contestants
from jaxgpt_bench.speed.options import SpeedOptions
from jaxgpt_bench.speed.programs import NATIVE
from jaxgpt_bench.speed.rounds import busy_processes, speed_row
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.native.library import instruction_sets
from waiting import SECONDS, killed_at_end, read_line

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import load_tokenizer

QUIET = Noise(
    seconds=10.0, load_before=0.1, load_after=2.0, runnable_before=0, runnable_after=2,
    others_cpu_share=0.01, stolen_share=0.0, pressure_some=0.02, pressure_full=0.0, probe_spread=0.04,
)  # fmt: skip
BUSY = dataclasses.replace(QUIET, others_cpu_share=0.38)


def kernel(root: Path, user: int, idle: int, steal: int, waited_us: int) -> None:
    """Write what a kernel of three cores counts, the third of them somebody else's."""
    core = f"{user} 10 20 {idle} 5 1 2 {steal} 7 0"
    total = "9999999 0 0 9999999 0 0 0 0 0 0"
    stat = f"cpu  {total}\ncpu0 {core}\ncpu1 {core}\ncpu2 {total}\nintr 1 2\n"
    (root / "stat").write_text(stat)
    (root / "loadavg").write_text("1.25 0.50 0.25 4/151 32577\n")
    (root / "pressure").mkdir(exist_ok=True)
    some = f"some avg10=99.85 avg60=99.70 avg300=97.77 total={waited_us}\n"
    (root / "pressure" / "cpu").write_text(f"{some}full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")


def test_what_others_used_is_what_the_cores_did_and_we_did_not(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    own = iter((3.0, 3.0 + 100 / ticks))
    kernel(tmp_path, user=1000, idle=1000, steal=50, waited_us=0)
    meter = NoiseMeter(tmp_path, lambda: next(own), cores=(0, 1))
    kernel(tmp_path, user=1150, idle=1030, steal=70, waited_us=1_000_000)
    noise = meter.noise([30.0, 33.0, 31.0])
    # Both cores: 300 ticks busy of 400, 100 of them ours; 40 stolen.
    assert noise.others_cpu_share == pytest.approx(200 / 400)
    assert noise.stolen_share == pytest.approx(40 / 400)
    assert noise.pressure_some == pytest.approx(1.0 / noise.seconds)
    assert noise.pressure_full == 0
    assert (noise.load_before, noise.runnable_after) == (1.25, 3)
    assert noise.probe_spread == pytest.approx(3 / 31)
    assert Noise.from_json(json.loads(json.dumps(noise.to_json()))) == noise


def test_what_a_system_does_not_tell_is_none(tmp_path: Path) -> None:
    noise = NoiseMeter(tmp_path, lambda: 1.0).noise()
    told = {name: value for name, value in vars(noise).items() if value is not None}
    assert told.keys() == {"seconds", "accepted"}
    assert reasons(noise) == reasons(None) == []
    (tmp_path / "pressure").mkdir()
    kernel(tmp_path, user=1, idle=1, steal=0, waited_us=0)
    unknown = NoiseMeter(tmp_path, lambda: None, cores=(0, 1))
    kernel(tmp_path, user=2, idle=2, steal=0, waited_us=0)
    assert unknown.noise().others_cpu_share is None
    assert unknown.noise().stolen_share == 0


def test_all_cores_count_where_ours_have_no_lines() -> None:
    stat = "cpu  4 0 1 5 0 0 0 2 0 0\ncpu0 4 0 1 5 0 0 0 2 0 0\n"
    for cores in ((0, 7), ()):
        found = cpu_time(stat, cores)
        assert found is not None
        assert (found.busy, found.stolen, found.total) == (5, 2, 12)
    assert cpu_time("", (0,)) is None
    assert cpu_time("cpu  1 2 3 4\n", (0,)) is None  # a kernel of long ago


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_busy_processes_that_we_start_are_ours_while_they_run_and_afterwards() -> None:
    before = own_cpu_seconds()
    with busy_processes(1):
        until = time.monotonic() + 20
        while (during := own_cpu_seconds()) < before + 0.2 and time.monotonic() < until:
            time.sleep(0.02)
    assert during >= before + 0.2
    assert own_cpu_seconds() >= during - 0.02  # ticks of the kernel


def test_a_server_that_runs_already_counts_as_ours_where_its_process_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = cpu_seconds_beside(["http://192.0.2.1:8080"])()
    assert elsewhere is not None
    monkeypatch.setattr("jaxgpt_bench.serving.servers._listening", lambda address: None)
    assert cpu_seconds_beside(["http://127.0.0.1:8080"])() is None
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(1, flush=True)\ninput()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)
    with killed_at_end(process):
        read_line(process, "the end of its work")
        twice = own_cpu_seconds([psutil.Process(process.pid)])
        assert twice == pytest.approx(own_cpu_seconds(), abs=0.05)  # a child is counted once
        process.communicate(b"\n", timeout=SECONDS)


def test_each_limit_has_its_words_and_a_quiet_machine_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert reasons(QUIET) == []
    at_limits = dataclasses.replace(
        QUIET, others_cpu_share=OTHERS_CPU_SHARE, stolen_share=STOLEN_SHARE, probe_spread=PROBE_SPREAD
    )
    assert reasons(at_limits) == []
    above = dataclasses.replace(QUIET, others_cpu_share=0.38, stolen_share=0.05, probe_spread=0.94)
    assert [text.split(" (")[0] for text in reasons(above)] == [
        "other processes used 38% of the cores",
        "the host took 5% of them",
        "the measured ceiling varied by 94% between rounds",
    ]
    warn(QUIET)
    warn(above)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "not quiet: other processes used 38%" in said[0]
    assert is_refused(above)
    assert not is_refused(dataclasses.replace(above, accepted=True))


def test_pages_are_not_written_from_busy_results_until_they_are_accepted(
    command: Command, tmp_path: Path
) -> None:
    from test_bench_pages import copy_of_pages

    folder = copy_of_pages(tmp_path)
    path = folder / "bench" / "results" / "demo.json"
    report = json.loads(path.read_text())
    report["speed"][1]["noise"] = BUSY.to_json()
    path.write_text(json.dumps(report))
    before = (folder / "README.md").read_bytes()
    pages = ("jaxgpt-bench", "pages", "--root", folder)
    assert_one_line_error(command(*pages), "demo.json", "38% of the cores", "--accept-noise")
    assert (folder / "README.md").read_bytes() == before
    judge_noise(path.parent, accept=True)
    accepted = [noise["accepted"] for noise in noises_in(json.loads(path.read_text()))]
    assert accepted == [True] * len(report["speed"])
    judge_noise(path.parent, accept=False)


def rounds_of(tokens: list[int]) -> list[dict[str, object]]:
    """Three rounds of a machine whose memory is three times as fast in the second."""
    measured = ((100.0, 20.0), (330.0, 60.0), (90.0, 20.0))  # tokens/s, 10^9 bytes a second
    return [
        {
            "tokens": tokens, "prefill_s": 0.1, "decode_s": (len(tokens) - 1) / rate, "read_gb_s": read,
            "long_prefill_s": 1.0, "settings": {}, "peak_rss_bytes": 1,
        }
        for rate, read in measured
    ]  # fmt: skip


def test_a_share_of_the_ceiling_is_of_the_same_round_and_stands_beside_its_own_ceiling(data: Path) -> None:
    contestant = Contestant(
        program=NATIVE,
        precision="int8-dynamic",
        path=data,
        threads=1,
        bytes_per_token=160_000_000,
        file_bytes=1,
    )
    tokenizer = load_tokenizer(data)
    text = "def add(a, b):\n    return a + b\n"
    tokens = tokenizer.encode(text)
    row = speed_row(contestant, rounds_of(tokens), 512, None, tokenizer)
    assert row.by_round is not None
    assert [each.ceiling_tokens_per_s for each in row.by_round] == pytest.approx([125, 375, 125])
    assert row.ceiling_shares == Spread.of([each.ceiling_share for each in row.by_round])
    assert (row.ceiling_share, row.ceiling_shares.max) == pytest.approx((0.8, 0.88))
    assert ceiling_text(row) == "80% (72-88%) of 125"
    rest = len(text) - len(tokenizer.decode(tokens[:1]))
    assert row.characters_per_s is not None
    assert row.characters_per_s.median == pytest.approx(100 * rest / (len(tokens) - 1))
    older = dataclasses.replace(row, ceiling_shares=None, by_round=None)
    assert ceiling_text(older) == "80% of 125"
    assert speed_row(contestant, rounds_of(tokens), 512, None).characters_per_s is None


def test_a_share_and_its_ceiling_agree_where_the_median_bandwidth_is_another_round_s(data: Path) -> None:
    contestant = Contestant(
        program=NATIVE,
        precision="int8-dynamic",
        path=data,
        threads=1,
        bytes_per_token=160_000_000,
        file_bytes=1,
    )
    answers = rounds_of([1] * 11)
    answers[0]["decode_s"], answers[2]["decode_s"] = 10 / 137, 10 / 137  # above what memory allowed before
    row = speed_row(contestant, answers, 512, None)
    assert row.decode_tokens_per_s.median > row.ceiling_tokens_per_s
    assert row.ceiling_share * row.shown_ceiling == pytest.approx(row.decode_tokens_per_s.median)


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_rows_name_the_instruction_set_of_the_environment(
    int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = [read_artifact(int8_dynamic)]

    def names() -> list[str]:
        found = own_contestants(artifacts, None, False, 1, ("portable",))
        return [each.name for each in found if each.program is NATIVE]

    monkeypatch.delenv("JAXGPT_ISA", raising=False)
    assert names() == ["jaxgpt-native int8-dynamic", "jaxgpt-native int8-dynamic, portable"]
    alone = own_contestants(artifacts, None, True, 1, module=False)
    assert [each.name for each in alone] == ["jaxgpt-native int8-dynamic"]
    monkeypatch.setenv("JAXGPT_ISA", "portable")
    assert names() == ["jaxgpt-native int8-dynamic, portable"]
    monkeypatch.setenv("JAXGPT_ISA", "mmx")
    with pytest.raises(UserError, match=r"JAXGPT_ISA 'mmx' is none of this machine's: .*portable"):
        check(SpeedOptions(preset="gpt2"))


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(params=["launcher", "watcher"])
def parent_and_child(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A process that started another one as the bench starts servers, and that one."""
    sleeps = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    if request.param == "launcher":
        start = f"subprocess.Popen(ended_with_us({sleeps!r}))"
    else:  # as on systems without the kernel's help
        watch = (
            f"import launcher, os; launcher.LOOKS_EVERY_S = 0.05; launcher.watch(os.getppid(), {sleeps!r})"
        )
        folder = str(Path(launcher.__file__).parent)
        start = f"subprocess.Popen([sys.executable, '-c', {watch!r}], cwd={folder!r})"
    code = (
        "import subprocess, sys, time\n"
        "from jaxgpt_bench.serving.servers import ended_with_us\n"
        f"{start}\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with killed_at_end(parent):
        child = int(read_line(parent, "the number of the process that it starts"))
        try:
            yield parent.pid, child
        finally:
            if not ended(child):
                os.kill(child, signal.SIGKILL)


def test_a_server_ends_when_the_bench_is_killed(parent_and_child: tuple[int, int]) -> None:
    parent, child = parent_and_child
    assert not ended(child)
    os.kill(parent, signal.SIGKILL)
    until = time.monotonic() + 20
    while not ended(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert ended(child)


def test_a_command_that_can_not_be_started_ends_with_an_error() -> None:
    found = subprocess.run(ended_with_us(["./no-such-program"]), capture_output=True, text=True)
    assert found.returncode != 0
    assert "no-such-program" in found.stderr or "No such file" in found.stderr
