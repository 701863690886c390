"""Every kernel on the PTX machine, in the PTX that ships, with the machine's checks on."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import quants
from aprlab.engines.ptx import PtxDevice
from aprlab.errors import UnsupportedError
from aprlab.kernels.cuda import launch as launches
from aprlab.kernels.cuda import verify
from aprlab.kernels.cuda.compile import one_entry, shipped_ptx
from aprlab.kernels.cuda.launch import DEQUANTISED, KERNELS, PACKED
from aprlab.kernels.cuda.static import entries
from aprlab.kernels.ptx import parse
from aprlab.quants import types
from aprlab.quants.types import TensorType

CASES = list(verify.cases())


@pytest.fixture
def device() -> PtxDevice:
    return PtxDevice(checks=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_kernel_agrees_with_its_oracle_and_commits_no_offence(case: verify.KernelCase, device: PtxDevice) -> None:
    bench = verify.Bench(device)
    outcome = case.run(bench)
    assert outcome.passed, outcome
    assert device.findings == []
    # what a GPU is compared with; None: this NumPy gives other random numbers than the one that made the file
    assert verify.as_the_machine(case.name, bench.bits(), verify.machine_bits()) in (True, None)


def test_what_a_gpu_is_compared_with_covers_all_cases_and_one_bit_is_seen() -> None:
    known = verify.machine_bits()
    assert set(known) == {case.name for case in CASES}
    bits = known["add"]
    assert verify.as_the_machine("add", bits, known) is True
    assert verify.as_the_machine("add", {**bits, "got": bits["got"][::-1]}, known) is False
    assert verify.as_the_machine("add", {**bits, "given": "0"}, known) is None


def test_the_cases_launch_every_kernel_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    class Silent(PtxDevice):
        def run(self, launch: launches.Launch) -> None:
            seen.add(launch.kernel.entry)

    for case in CASES:
        case.run(verify.Bench(Silent()))
    assert seen == set(KERNELS)


def test_the_table_and_the_shipped_kernels_agree() -> None:
    """Names, parameters in number and kind, threads a block."""
    kinds = {"u64": "p", "u32": "u", "f32": "f"}
    shipped = {}
    for module in {kernel.module for kernel in KERNELS.values()}:
        for entry in entries(shipped_ptx(module)):
            shipped[entry] = (module, parse(one_entry(shipped_ptx(module), entry)).entries[entry])
    assert set(shipped) == set(KERNELS)
    for entry, (module, parsed) in shipped.items():
        kernel = KERNELS[entry]
        assert kernel.module == module
        assert kernel.parameters == "".join(kinds[param.type] for param in parsed.params)
        assert parsed.directives["maxntid"][0] == kernel.threads


# ---- the oracles themselves can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [types.Q4_K, types.Q5_0, types.F16], ids=str)
def test_one_wrong_bit_is_one_unequal_value(kind: TensorType, device: PtxDevice) -> None:
    values = 512
    raw = verify.random_weights(kind, 1, values)
    case = verify.dequantise_case(kind, "f32", raw, values)
    assert case.run(verify.Bench(device)).error == 0
    flipped = raw.copy()
    flipped[-3] ^= 1  # a bit of the last quants
    at, room = (bench := verify.Bench(device)).room(4 * values)
    bench.run(launches.dequantise(kind, bench.put(flipped), at, values))
    outcome = verify.unequal(bench.get(room, (values,), np.float32), quants.dequantise(raw, kind, (values,)))
    assert outcome.error == 1
    assert not outcome.passed


@pytest.mark.parametrize("contract", launches.CONTRACTS)
def test_the_bound_of_a_matvec_sees_one_value_off_by_one_step(contract: str, device: PtxDevice) -> None:
    """The smallest decoding error there is, in one value of 2,560, is far outside of what rounding may do."""
    kind, rows, cols = types.Q4_K, 9, 2560
    raw, x = verify.random_weights(kind, rows, cols), verify.random_activations(1, cols)
    column = int(np.abs(x[0, :32]).argmax())
    flipped = raw.copy()
    flipped[16 + column] ^= 1
    bench = verify.Bench(device)
    prepared, _ = bench.room(launches.prepared_bytes(contract, 1, cols))
    at, room = bench.room(4 * rows)
    bench.run(launches.prepare(contract, bench.put(x), prepared, 1, cols))
    bench.run(launches.matvec(kind, contract, bench.put(flipped), prepared, launches.NULL, at, 1, rows, cols))
    used = x.astype(np.float64)
    if contract == "q8":
        q, d = verify.round_to_q8(x)
        used = q * np.repeat(d.astype(np.float64), 32, -1)
    truth = used @ quants.dequantise(raw, kind, (rows, cols)).astype(np.float64).T
    bound = verify._roundings(kind, contract, cols) * verify.UNIT * (np.abs(used) @ verify.magnitudes(raw, kind, rows, cols).T)
    off = np.abs(bench.get(room, (1, rows), np.float32) - truth) / bound
    assert off[0, 0] > 10
    assert off[0, 1:].max() <= 1


def test_the_contracts_differ_by_what_eight_bits_lose(device: PtxDevice) -> None:
    """q8 against exact activations is off by about 1e-3 of the sum of magnitudes: a contract, not a bug."""
    kind, rows, cols = types.Q6_K, 7, 2560
    raw, x = verify.random_weights(kind, rows, cols), verify.random_activations(1, cols)
    results = {}
    for contract in launches.CONTRACTS:
        bench = verify.Bench(device)
        prepared, _ = bench.room(launches.prepared_bytes(contract, 1, cols))
        at, room = bench.room(4 * rows)
        bench.run(launches.prepare(contract, bench.put(x), prepared, 1, cols))
        bench.run(launches.matvec(kind, contract, bench.put(raw), prepared, launches.NULL, at, 1, rows, cols))
        results[contract] = bench.get(room, (rows,), np.float32)
    size = np.abs(x[0].astype(np.float64)) @ np.abs(quants.dequantise(raw, kind, (rows, cols)).astype(np.float64)).T
    gap = np.abs(results["f32"].astype(np.float64) - results["q8"]) / size
    assert 1e-5 < gap.max() < 1e-2


def test_nan_activations_stay_nan_in_both_contracts(device: PtxDevice) -> None:
    kind, rows, cols = types.Q4_K, 3, 512
    raw, x = verify.random_weights(kind, rows, cols), verify.random_activations(1, cols)
    x[0, 300] = np.nan
    for contract in launches.CONTRACTS:
        bench = verify.Bench(device)
        prepared, _ = bench.room(launches.prepared_bytes(contract, 1, cols))
        at, room = bench.room(4 * rows)
        bench.run(launches.prepare(contract, bench.put(x), prepared, 1, cols))
        bench.run(launches.matvec(kind, contract, bench.put(raw), prepared, launches.NULL, at, 1, rows, cols))
        assert np.isnan(bench.get(room, (rows,), np.float32)).all()


# ---- what launches refuse --------------------------------------------------------------------------------------------


def test_launches_refuse_what_no_kernel_does() -> None:
    with pytest.raises(UnsupportedError, match=r"Q2_K.*Q4_0, Q4_1"):
        launches.matvec(types.Q2_K, "f32", 0, 0, 0, 0, 1, 8, 256)
    with pytest.raises(UnsupportedError, match=r"'q4'.*f32, q8"):
        launches.matvec(types.Q4_K, "q4", 0, 0, 0, 0, 1, 8, 256)
    with pytest.raises(UnsupportedError, match=r"80.*32, 64, 96, 128, 256"):
        launches.attend(0, 0, 0, 0, 0, 1, 2, 1, 80)
    with pytest.raises(UnsupportedError, match="'yarn'"):
        launches.rope("yarn", 0, 0, 0, 1, 2, 64)
    with pytest.raises(UnsupportedError, match="f64"):
        launches.dequantise(types.Q4_K, 0, 0, 256, "f64")
    with pytest.raises(UnsupportedError, match="F32"):
        launches.dequantise(types.F32, 0, 0, 256)
    with pytest.raises(UnsupportedError, match="48"):
        launches.prepare("f32", 0, 0, 1, 48)


def test_every_packed_type_has_both_contracts_and_every_type_is_dequantised() -> None:
    for kind in PACKED:
        assert {f"matvec_{kind.name.lower()}", f"matvec_{kind.name.lower()}_q8"} <= set(KERNELS)
    assert [k.name for k in DEQUANTISED] == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"]
