"""All verbs of the command, in one table. To add one: write its function in the module of its panel, and a row here."""

from __future__ import annotations

from aprlab.cli import cases, convert, find, gpu, look, machine_room, prove, ptx, tell
from aprlab.cli.options import ENGINE, ENGINE_ALONE, ENGINES, FORCE, JSON, LENGTH, OUTPUT, SAMPLING
from aprlab.cli.registry import Verb, VerbGroup

LOOK, CONVERT, FIND, PROVE, TELL, MACHINE_ROOM = "look", "convert", "find", "prove", "tell", "machine room"

_DIFFER = {1: "they differ"}
_KERNEL = "--entry dequantise_q6_k_f32 --grid elements/1024 --block 256 --tensor blk.0.ffn_down.weight"
_LAUNCHED = f"{_KERNEL} --arg weights --arg out --arg quads=elements//4"
_WRONG = {1: "the result is wrong"}

GROUPS: tuple[VerbGroup, ...] = (
    VerbGroup("case", TELL, "Hand a verdict over, as notebook, page and facts; open one that was sent.", "case new broken.apr"),
    VerbGroup("ptx", MACHINE_ROOM, "Run, check, profile and step anyone's PTX on the CPU.", "ptx entries kernels.ptx"),
    VerbGroup("gpu", MACHINE_ROOM, "Verify the CUDA kernels on a GPU, compile them, list their faults.", "gpu verify"),
)

VERBS: tuple[Verb, ...] = (
    Verb("inspect", LOOK, look.inspect, "inspect model.gguf --json", (JSON,)),
    Verb("fingerprint", LOOK, look.fingerprint, "fingerprint model.gguf model.apr", (JSON,), _DIFFER),
    Verb("diff", LOOK, look.diff, "diff model.gguf model.apr", (JSON,), _DIFFER),
    Verb(
        "run", LOOK, look.run, 'run model.apr -p "What is 2+2?" --trace "layers.*.out" --trace-out trace.npz',
        (SAMPLING, LENGTH, ENGINE, FORCE, JSON), {1: "logits are not numbers"},
    ),
    Verb("trace", LOOK, look.trace, "trace model.gguf --source reference -o reference.npz", (OUTPUT,)),
    Verb("compare", LOOK, look.compare, "compare ours.npz jit.npz", (JSON,), _DIFFER),
    Verb("chat", LOOK, look.chat, "chat model.apr --system 'Answer in one word.'", (SAMPLING, LENGTH, ENGINE)),
    Verb("convert", CONVERT, convert.convert, "convert model.gguf -o new.apr --verbose", (OUTPUT, JSON)),
    Verb("export", CONVERT, convert.export, "export model.apr -o folder --format safetensors --dtype f32", (OUTPUT, JSON)),
    Verb("fetch", CONVERT, convert.fetch, "fetch qwen2.5-coder-0.5b", (FORCE, JSON)),
    Verb("synth", CONVERT, convert.synth, "synth --like qwen2.5-coder-0.5b --type q4_k_m -o random.gguf", (OUTPUT, JSON)),
    Verb(
        "peel", FIND, find.peel, "peel model.gguf broken.apr --json", (ENGINES, JSON),
        {3: "broken", 4: "open: not enough evidence"},
    ),
    Verb(
        "repair", FIND, find.repair, "repair broken.apr -o fixed.apr --reference model.gguf", (OUTPUT, ENGINE, JSON),
        {3: "the file that was written is not yet right"},
    ),
    Verb("faults", FIND, find.faults, "faults GH-191", (JSON,)),
    Verb(
        "forensics", FIND, find.forensics, "forensics model.gguf --saw '3,}, helf helf.How helf' --only rope-norm",
        (ENGINE, JSON),
    ),
    Verb(
        "signatures", FIND, find.signatures, "signatures model.gguf --json", (LENGTH, ENGINE, JSON), alias="voices",
    ),
    Verb(
        "gates", PROVE, prove.gates, "gates model.gguf model.apr --engine jit:q8", (LENGTH, ENGINE_ALONE, JSON),
        {3: "a gate fails", 4: "a gate can say nothing"},
    ),
    Verb(
        "verify", PROVE, prove.verify, "verify folder model.gguf --out reports", (ENGINE, JSON),
        {3: "not certified", 4: "not enough evidence"},
    ),
    Verb("check", PROVE, prove.check, "check model.apr", (ENGINE_ALONE, JSON), {3: "a stage fails"}),
    Verb(
        "selftest", PROVE, prove.selftest, "selftest --fault order-blind-checksum", (JSON,), {1: "an instrument is faulty"}
    ),
    Verb(
        "qualify", PROVE, prove.qualify, "qualify model.gguf --playbook quick --formats gguf,apr", (ENGINE, JSON),
        {3: "not fit for release", 4: "not enough evidence"},
    ),
    Verb(
        "investigate", TELL, tell.investigate, "investigate --model model.gguf --only 00_golden_rule --out reports",
        (ENGINE_ALONE,), {1: "a notebook failed, or one of its checks does not hold"},
    ),
    Verb(
        "sweep", TELL, tell.sweep, "sweep matrix.yaml --jobs 2 --out reports/sweep", (),
        {1: "a run failed, or one of its checks does not hold"},
    ),
    Verb(
        "new", TELL, cases.new, "case new model.gguf broken.apr -o case-17", (ENGINE_ALONE, FORCE, JSON), within="case",
    ),
    Verb(
        "open", TELL, cases.open_, "case open case-17.zip", (JSON,), {1: "a file at hand, or a part of the case, is another one"},
        within="case",
    ),
    Verb("lab", TELL, tell.lab, "lab --no-browser --port 8890"),
    Verb(
        "doctor", MACHINE_ROOM, machine_room.doctor, "doctor --json", (JSON,), {1: "something that is needed is missing"}
    ),
    Verb("entries", MACHINE_ROOM, ptx.entries, "ptx entries kernels.ptx", within="ptx"),
    Verb("run", MACHINE_ROOM, ptx.run, f"ptx run kernels.ptx {_LAUNCHED}", (ptx.LAUNCH,), _WRONG, within="ptx"),
    Verb(
        "check", MACHINE_ROOM, ptx.check, f"ptx check kernels.ptx {_LAUNCHED}", (ptx.LAUNCH,),
        {1: "there are findings, or the result is wrong"}, within="ptx",
    ),
    Verb("profile", MACHINE_ROOM, ptx.profile, f"ptx profile kernels.ptx {_LAUNCHED}", (ptx.LAUNCH,), _WRONG, within="ptx"),
    Verb("step", MACHINE_ROOM, ptx.step, f"ptx step kernels.ptx {_LAUNCHED} --count 5", (ptx.LAUNCH,), within="ptx"),
    Verb("verify", MACHINE_ROOM, gpu.verify, "gpu verify", exits={1: "a case fails"}, within="gpu"),
    Verb("compile", MACHINE_ROOM, gpu.compile_kernels, "gpu compile --arch 80", exits={1: "a gate fails"}, within="gpu"),
    Verb("faults", MACHINE_ROOM, gpu.faults, "gpu faults", within="gpu"),
)  # fmt: skip
