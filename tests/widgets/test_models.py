"""View-models, driven as a widget would drive them, without any widget."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aprlab.errors import UsageError
from aprlab.faults import FAULTS
from aprlab.formats import open_model
from aprlab.onion.peeling import peel
from aprlab.quants import REGISTRY, types
from aprlab.widgets import pages
from aprlab.widgets.models import evidence, tensors
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.blocks import WINDOW, Block, BlockMicroscope, faults_of
from aprlab.widgets.models.files import Side, known_files
from aprlab.widgets.models.kernel import KernelStepper
from aprlab.widgets.models.onion import OnionExplorer
from aprlab.widgets.models.tensors import TensorBrowser
from aprlab.widgets.models.traces import TraceExplorer

GATE, NORM, HEAD = "blk.0.ffn_gate.weight", "blk.0.attn_norm.weight", "output.weight"


def test_models_need_no_widget_library() -> None:
    names = ["onion", "blocks", "tensors", "traces", "kernel"]
    code = "; ".join(f"import aprlab.widgets.models.{name}" for name in names)
    code += "; import sys; assert not {'ipywidgets', 'anywidget', 'IPython', 'traitlets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ── work ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_work_tells_its_progress_and_its_end() -> None:
    thing, seen = Observable(), []
    thing.listen(lambda: seen.append((thing.work.busy, thing.work.doing, thing.work.done)))
    thing.work.start("a", lambda: thing.work.tell("b", 0.5))
    thing.work.wait()
    assert seen == [(True, "a", 0.0), (True, "b", 0.5), (False, "", 1.0)]
    assert thing.work.error == ""


def test_work_is_one_at_a_time_and_can_be_stopped() -> None:
    thing, go, begun = Observable(), threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        go.wait(30)
        thing.work.tell("on and on", 0.1)
        raise AssertionError("it was not stopped")

    thing.work.start("long", job)
    begun.wait(30)
    with pytest.raises(UsageError, match="still busy: long"):
        thing.work.start("other", job)
    with pytest.raises(TimeoutError, match="long"):
        thing.work.wait(0.01)
    thing.work.stop()
    go.set()
    thing.work.wait()
    assert (thing.work.busy, thing.work.error) == (False, "stopped")


def test_a_listener_that_raises_leaves_nothing_busy() -> None:
    def listener() -> None:
        raise ZeroDivisionError

    thing = Observable()
    thing.listen(listener)
    with pytest.raises(ZeroDivisionError):
        thing.work.start("a", lambda: None)
    thing.work.free()
    assert (thing.work.busy, thing.work.doing) == (False, "")


def test_what_is_under_way_is_not_disturbed(tiny: Path) -> None:
    onion, traces = OnionExplorer(), TraceExplorer(tiny)
    scope, stepper = BlockMicroscope(Side.open(tiny, "a")), KernelStepper()
    tries: list[tuple[Observable, Callable[[], None]]] = [
        (onion, lambda: onion.choose(faults=[])), (onion, onion.run),
        (traces, lambda: traces.choose(prompt="x")), (traces, traces.run),
        (scope, lambda: scope.choose(row=1)), (scope, lambda: scope.toggle("")),
        (stepper, lambda: stepper.choose(operation="matvec")), (stepper, lambda: stepper.watch(lane=3)),
        (stepper, stepper.restart), (stepper, stepper.step),
    ]  # fmt: skip
    go = threading.Event()
    for model in (onion, traces, scope, stepper):
        model.work.start("long", lambda: go.wait(30) and None)
        before = {name: value for name, value in vars(model).items() if name != "work"}
        for owner, action in tries:
            if owner is model:
                with pytest.raises(UsageError, match="still busy: long"):
                    action()
        assert {name: value for name, value in vars(model).items() if name != "work"} == before
    go.set()
    for model in (onion, traces, scope, stepper):
        model.work.wait()


@pytest.mark.parametrize(
    ("error", "line"), [(UsageError("no", code="test.rule", path="f"), "f: no"), (ValueError("x"), "ValueError: x")]
)
def test_a_failure_is_one_line(error: Exception, line: str) -> None:
    def job() -> None:
        raise error

    thing = Observable()
    thing.work.start("a", job)
    thing.work.wait()
    assert thing.work.error == line


# ── progress of peel ──────────────────────────────────────────────────────────────────────────────────────────────


def test_peel_tells_its_stages_in_order(tiny: Path, mislabelled: Path) -> None:
    told: list[tuple[str, int | None]] = []
    verdict = peel(
        tiny, mislabelled, fast=True, progress=lambda name, found: told.append((name, None if found is None else len(found)))
    )
    assert [name for name, found in told if found is None] == list(verdict.seconds)
    assert ("dtype", 58) in told
    assert ("naming", 0) in told
    with pytest.raises(KeyboardInterrupt):
        peel(tiny, mislabelled, progress=_interrupt)


def _interrupt(name: str, found: object) -> None:
    raise KeyboardInterrupt


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_known_files_begin_with_the_embedded_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.gguf").touch()
    (tmp_path / "note.txt").touch()
    monkeypatch.setenv("APRLAB_MODELS", str(tmp_path))
    found = known_files({"mine": "x.apr"})
    assert list(found) == ["embedded (tiny)", "b", "mine"]
    assert found["embedded (tiny)"] == tiny


def test_a_refused_file_is_looked_at_all_the_same(mislabelled: Path) -> None:
    side = Side.open(mislabelled, "broken")
    assert "breaks the size law" in side.refusal
    assert side.model is None
    assert len(side.tensors) == 90
    assert {side.type_of(name) for name in side.unreadable} == {"label 9 (Q8_1/AprQ8)"}
    assert side.type_of(GATE) == "AprQ4"  # 144 bytes for 256 values: another type takes exactly as many
    assert side.shape_of(HEAD) == (840, 256)
    assert side.nbytes_of(HEAD) == 840 * 210
    assert (side.type_of("nobody"), side.shape_of("nobody"), side.nbytes_of("nobody")) == ("", (), 0)


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def browser(tiny: Path, mislabelled: Path) -> TensorBrowser:
    found = TensorBrowser(Side.open(tiny, "a"), Side.open(mislabelled, "b"))
    found.work.wait()
    return found


def test_two_files_are_compared_in_the_background(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, told = threading.Event(), []

    def status(here: Side, there: Side, name: str) -> str:
        assert go.wait(30)
        return "same"

    monkeypatch.setattr(TensorBrowser, "_status", staticmethod(status))
    monkeypatch.setattr(tensors, "_REPORT_EVERY", 1 << 18)
    found = TensorBrowser(Side.open(tiny, "a"), Side.open(tiny, "b"))
    found.listen(lambda: told.append(found.work.done))
    assert found.work.busy
    assert len(found.rows) == 99
    assert found.counts == {}
    go.set()
    found.work.wait()
    assert found.counts == {"same": 99}
    assert len(told) > 2
    assert told == sorted(told)


def test_every_tensor_has_its_status(browser: TensorBrowser, tiny: Path, one_scale: Path) -> None:
    assert browser.counts == {"same": 41, "type": 49, "unreadable": 9}
    here, there = Side.open(tiny), Side.open(one_scale)
    there.tensors = dict(there.tensors)
    lost = there.tensors.pop(NORM)
    there.tensors["extra"] = lost
    there.tensors["blk.1.attn_norm.weight"] = lost.replace(shape=(2, 128))
    other = TensorBrowser(here, there)
    other.work.wait()
    assert other.counts == {"same": 48, "bytes": 49, "shape": 1, "only here": 1, "only there": 1}
    assert [row.name for row in other.all][-1] == "extra"
    with pytest.raises(UsageError, match="3 files"):
        TensorBrowser(here, here, here)
    assert {row.status for row in TensorBrowser(here).all} == {""}


def test_sorting_and_filtering(browser: TensorBrowser) -> None:
    order = [row.name for row in browser.rows]
    browser.sort("bytes")
    assert [row.nbytes for row in browser.rows] == sorted(row.nbytes for row in browser.all)
    browser.sort("bytes")
    assert browser.rows[0].name == HEAD
    browser.sort("bytes")
    assert [row.name for row in browser.rows] == order
    browser.filter(text="ATTN bias")
    assert {row.name.split(".", 2)[2] for row in browser.rows} == {"attn_q.bias", "attn_k.bias", "attn_v.bias"}
    browser.filter(text="", statuses={"unreadable"})
    assert len(browser.rows) == 9
    with pytest.raises(UsageError, match="no column 'colour'"):
        browser.sort("colour")


def test_a_tensor_is_looked_at(browser: TensorBrowser, tiny: Path, one_scale: Path) -> None:
    other = TensorBrowser(Side.open(tiny, "a"), Side.open(one_scale, "b"))
    other.work.wait()
    other.choose(GATE)
    other.work.wait()
    assert other.detail is not None
    assert other.detail.words == "other values"
    assert other.detail.values["a"].shape == (512, 256)
    assert other.detail.prints["a"].values != other.detail.prints["b"].values
    browser.choose(NORM)
    browser.work.wait()
    assert browser.detail is not None
    assert browser.detail.words == "the same bytes and values"
    with pytest.raises(UsageError, match="no tensor 'nobody'"):
        browser.choose("nobody")


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_block(kind: types.TensorType) -> Block:
    rng = np.random.default_rng(list(kind.name.encode()))
    count = WINDOW if kind.block_elements == 1 else 1
    values = rng.standard_normal((1, count * kind.block_elements)).astype(np.float32)
    raw = REGISTRY[kind].quantise(values).reshape(-1)
    head = kind.tensor_bytes
    return Block(kind, raw[head:], raw[:head], REGISTRY[kind])


@pytest.mark.parametrize("kind", [types.Q4_K, types.Q6_K, types.Q4_0, types.Q8_0, types.F16, types.BF16], ids=str)
def test_bits_and_values_know_each_other(kind: types.TensorType) -> None:
    block = random_block(kind)
    assert sum(field.stop - field.start for field in block.fields) >= len(block.raw) // (
        WINDOW if kind.block_elements == 1 else 1
    )
    for value in (0, block.size - 1):
        bits = block.bits_of(value)
        raw = block.raw.copy()
        for places in bits.values():
            for byte, _ in places:
                assert value in block.values_of(byte)
        byte = next(iter(bits.values()))[0][0]
        raw[byte] ^= 1 << next(iter(bits.values()))[0][1]
        assert block.decode(raw)[value].tobytes() != block.decode()[value].tobytes()


def test_a_q4_k_value_is_made_of_four_bits_two_scales_and_two_numbers(tiny: Path) -> None:
    scope = BlockMicroscope(Side.open(tiny, "a"), name=GATE)
    bits = scope.first.bits_of(5)
    assert {name: len(places) for name, places in bits.items()} == {"d": 16, "dmin": 16, "scales": 12, "qs": 4}
    assert bits["qs"] == [(21, bit) for bit in range(4)]
    assert scope.first.values_of(21).tolist() == [5, 37]
    scope.click(byte=21)
    assert scope.marked() == ({21}, {5, 37})
    scope.click(byte=21)
    assert scope.marked() == (set(), set())
    scope.click(value=37)
    assert {21, 0, 1, 2, 3} <= scope.marked()[0]


def test_a_fault_is_compared_with_the_truth_and_the_worst_block_found(tiny: Path) -> None:
    scope = BlockMicroscope(Side.open(tiny, "a"), name=GATE)
    assert "q4k-min-lost" in scope.faults
    assert set(faults_of(types.Q6_K)) & set(scope.faults) <= set(scope.faults)
    with pytest.raises(UsageError, match="nothing to compare"):
        scope.find_worst()
    with pytest.raises(UsageError, match="does not decode Q4_K"):
        scope.toggle("q8-36-bytes")
    scope.toggle("q4k-min-lost")
    scope.find_worst()
    scope.work.wait()
    with open_model(tiny) as model:
        tensor = model.tensor(GATE)
        apart = np.abs(tensor.dequantise() - faults_of(types.Q4_K)["q4k-min-lost"].dequantise(tensor.raw, tensor.shape))
    row, column = np.unravel_index(int(apart.argmax()), apart.shape)
    assert (scope.row, scope.block) == (row, column // 256)
    assert scope.rows()[0]["apart"] == pytest.approx(float(apart.max()))
    assert f"{apart.max():.4g}" in scope.worst_words
    scope.choose(name="blk.0.attn_norm.weight", row=99, block=99)
    assert (scope.row, scope.block, scope.fault, scope.blocks) == (0, 7, "", 8)
    assert len(scope.first.raw) == 4 * WINDOW


def test_without_a_tensor_to_look_at_there_is_no_microscope() -> None:
    with pytest.raises(UsageError, match="a has no tensor that can be decoded"):
        BlockMicroscope(Side("a", Path("a.apr")))


def test_two_sides_of_one_block(tiny: Path, one_scale: Path) -> None:
    scope = BlockMicroscope(Side.open(tiny, "a"), Side.open(one_scale, "b"), name=GATE)
    scope.find_worst()
    scope.work.wait()
    values = scope.values()
    assert list(values) == ["a", "b"]
    assert not np.array_equal(values["a"], values["b"])
    scope.choose(name=NORM)
    scope.find_worst()
    scope.work.wait()
    assert "no value differs from b" in scope.worst_words


# ── traces ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inherited_and_introduced_error_are_separated(tiny: Path) -> None:
    explorer = TraceExplorer(tiny, ["rope-norm"])
    with pytest.raises(UsageError, match="run it first"):
        explorer.click("layers.0.q")
    explorer.run()
    explorer.work.wait()
    assert explorer.work.error == ""
    steps, whole = explorer.map()
    assert explorer.first() == "layers.0.q_rope"
    assert (whole[0, : steps.index("q_rope")] == 0).all()
    assert (whole[1:] > 0).all()
    explorer.click("layers.0.q_rope")
    assert explorer.detail is not None
    assert explorer.detail.by_position[0] == 0
    assert (explorer.detail.by_position[1:] > 0).all()
    position, index, a, b = explorer.detail.worst[0]
    flat = explorer.detail.healthy.reshape(len(explorer.detail.healthy), -1)
    assert flat[position, index] == np.float32(a) != np.float32(b)
    explorer.set_mode("introduced")
    _, introduced = explorer.map()
    wrong = {step for step, column in zip(steps, introduced.T, strict=True) if column.any()}
    assert wrong == {"q_rope", "k_rope"}
    with pytest.raises(UsageError, match="unknown mode"):
        explorer.set_mode("both")


def test_a_healthy_pair_is_equal_everywhere(tiny: Path) -> None:
    explorer = TraceExplorer(tiny)
    explorer.choose(prompt="Hi")
    explorer.run()
    explorer.work.wait()
    assert explorer.first() == ""
    assert not explorer.map()[1].any()
    explorer.click("layers.0.q")
    assert explorer.detail is not None
    assert explorer.detail.worst == []


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stepping_goes_through_the_source() -> None:
    stepper = KernelStepper()
    assert stepper.kernel.entry == "dequantise_q4_k_f32"
    start = stepper.view.step
    stepper.step("instruction", 3)
    assert stepper.view.step == start + 3
    stepper.step("line")
    text = [line for line in stepper.source() if line.number == stepper.view.line]
    assert len(text) == 1
    assert stepper.ptx()[stepper.view.ptx_line - 1].text.split()[-1].rstrip(";") in stepper.view.instruction + ";"
    changed = [name for name, _, fresh in stepper.registers() if fresh]
    assert changed == stepper.view.changed
    stepper.watch(register=changed[0], lane=31)
    assert stepper.lanes()[31] == stepper.registers()[0][1]
    line = stepper.view.line
    stepper.restart()
    stepper.run_to(line)
    stepper.work.wait()
    assert stepper.view.line == line
    ahead = next(n for n in range(stepper.view.ptx_line + 1, stepper.view.ptx_line + 20) if ";" in stepper.ptx()[n - 1].text)
    stepper.run_to_ptx(ahead)
    stepper.work.wait()
    assert stepper.view.ptx_line == ahead
    stepper.run_to(1)  # a line that no instruction belongs to: the warp ends
    stepper.work.wait()
    assert stepper.view.finished
    assert "the warp has ended" in stepper.words()


@pytest.mark.parametrize("run", [lambda s: s.run_to(1), lambda s: s.run_to_ptx(1)], ids=["line", "PTX line"])
def test_a_warp_stays_where_it_was_stopped(run: Callable[[KernelStepper], None]) -> None:
    stepper = KernelStepper(operation="matvec")
    busy: list[bool] = []

    def stop() -> None:
        busy.append(stepper.work.busy)
        stepper.work.stop()

    stepper.listen(stop)
    run(stepper)
    stepper.work.wait()
    assert stepper.work.error == "stopped"
    assert busy[0]
    assert not stepper.view.finished
    stood = stepper.view.step
    assert stood > 0
    stepper.step("instruction")
    assert stepper.view.step > stood


def test_a_file_without_a_matrix_for_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = SimpleNamespace(type=types.F32, shape=(8,))
    monkeypatch.setattr("aprlab.widgets.models.kernel.open_model", lambda path: SimpleNamespace(path=path, tensors={NORM: norm}))
    with pytest.raises(UsageError, match=r"a.apr: no matrix of a type that there is a kernel for: .*Q4_K"):
        KernelStepper("a.apr")


@pytest.mark.parametrize("operation", ["dequantise", "matvec"])
def test_the_whole_launch_is_counted_and_checked(operation: str) -> None:
    stepper = KernelStepper(name=HEAD, operation=operation)
    stepper.profile()
    stepper.work.wait()
    assert stepper.comparison is not None
    assert stepper.comparison.right
    assert sum(line.cost.warp_instructions for line in stepper.source() if line.cost) > 0
    assert bool(stepper.shared()) == (operation == "matvec")


def test_a_seeded_bug_is_shown_and_convicted() -> None:
    stepper = KernelStepper()
    assert "q4k-min-lost" in stepper.faults
    assert "q8-36-bytes" not in stepper.faults
    healthy = {name: list(lines) for name, lines in stepper.sources.items()}
    stepper.choose(fault="q4k-min-lost")
    assert stepper.sources != healthy
    stepper.profile()
    stepper.work.wait()
    assert stepper.comparison is not None
    assert stepper.comparison.wrong > 0
    with pytest.raises(UsageError, match="does not change"):
        stepper.choose(fault="q8-36-bytes")
    with pytest.raises(UsageError, match="unknown operation"):
        stepper.choose(operation="think")
    stepper.choose(name=HEAD)  # another type: the bug is gone, and so is what was counted
    assert (stepper.fault, stepper.report) == ("", None)


# ── onion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_with_two_faults_is_peeled_shown_and_repaired() -> None:
    onion = OnionExplorer()
    states: list[str] = []
    onion.listen(lambda: states.append(onion.work.doing))
    onion.choose(faults=["GH-190", "q4k-min-lost"])
    onion.run()
    onion.work.wait()
    assert onion.work.error == ""
    assert onion.verdict is not None
    assert onion.verdict.faults == ["GH-190", "q4k-min-lost"]
    assert all(stage.state == "done" for stage in onion.stages)
    found = {stage.name: stage.clean for stage in onion.stages if stage.clean is not None}
    assert [name for name, clean in found.items() if not clean] == ["naming", "weights"]
    words = [stage.words for stage in onion.stages]
    assert [state for state in dict.fromkeys(states) if state in words] == words
    assert onion.healthy is not None
    assert onion.answers[0].refusal == "unknown tensor name"
    for number, (words, rows) in enumerate([("what a reader finds by name", 98), ("on the thin line", 0)]):
        onion.look(number)
        onion.work.wait()
        assert onion.evidence is not None
        assert onion.evidence.image.startswith(b"\x89PNG")
        assert words in onion.evidence.caption
        assert len(onion.evidence.rows) == rows
    onion.look(1)
    assert onion.evidence is None
    names, values = onion.repairs
    onion.repair(names)
    onion.work.wait()
    assert not onion.restored
    onion.repair(values)
    onion.work.wait()
    assert onion.restored
    assert onion.repaired == (names, values)
    onion.repair(names)  # taken back
    onion.work.wait()
    assert onion.repaired == (values,)
    assert onion.answer is not None
    assert onion.answer.refusal
    with pytest.raises(UsageError, match="no repair 'x'"):
        onion.repair("x")
    with pytest.raises(UsageError, match="finding 9 of 2"):
        onion.look(9)


def test_a_faulty_reader_is_peeled_and_repaired() -> None:
    onion = OnionExplorer()
    onion.choose(form="reader", faults=["rope-norm"])
    onion.run()
    onion.work.wait()
    assert onion.work.error == ""
    assert onion.repairs == ["config/rope-norm"]
    onion.look(0)
    onion.work.wait()
    assert onion.evidence is not None
    assert onion.evidence.image.startswith(b"\x89PNG")
    assert "error at each position" in onion.evidence.caption
    onion.repair("config/rope-norm")
    onion.work.wait()
    assert onion.restored


def test_a_tokenizer_that_breaks_is_shown_in_words() -> None:
    def refuse(prompt: str, raw: bool) -> None:
        raise TypeError("no merges")

    sound = SimpleNamespace(wants_raw=True, prompt_tokens=lambda prompt, raw: [1], tokenizer=SimpleNamespace(decode=str))
    broken = SimpleNamespace(wants_raw=True, prompt_tokens=refuse)
    assert evidence._tokens(sound, broken, "Hi") == ((0, "1 '[1]'", "no merges", "differs"),)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused(mislabelled: Path, tmp_path: Path) -> None:
    onion = OnionExplorer()
    instrument = next(id for id, fault in FAULTS.items() if fault.instrument is not None)
    with pytest.raises(UsageError, match="does not enter in the file"):
        onion.choose(faults=[instrument])
    with pytest.raises(UsageError, match="no model and no file 'x'; the reference is still"):
        onion.choose(model="x")
    with pytest.raises(UsageError, match="unknown form"):
        onion.choose(form="kernel")  # type: ignore[arg-type]
    onion.choose(form="reader")
    assert onion.faults == ()  # GH-191 is a file's alone
    onion.choose(candidate=str(mislabelled))
    with pytest.raises(UsageError, match="as a file"):
        onion.run()
    onion.choose(form="file", candidate=str(tmp_path / "nothing.apr"), faults=["GH-191"])
    with pytest.raises(UsageError, match=r"chosen faults \(GH-191\): the suspect is one or the other"):
        onion.run()
    onion.choose(faults=[])
    onion.run()
    onion.work.wait()
    assert "nothing.apr" in onion.work.error
    assert onion.verdict is None
    (tmp_path / "page.apr").write_text("<html>Sign in to download</html>")
    onion.choose(candidate=str(tmp_path / "page.apr"))
    onion.run()
    onion.work.wait()
    assert onion.refusal.startswith("page.apr is refused: "), onion.findings
    assert "page.apr is refused" in pages.verdict_line(onion)
    with pytest.raises(UsageError, match="nothing is repaired yet"):
        onion.save(tmp_path / "x.apr")
    onion.choose(model=str(mislabelled))  # a path is a model, too
    assert onion.files[str(mislabelled)] == mislabelled
