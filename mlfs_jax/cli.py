"""The command line: ``mlfs fetch | fit | palette | export | verify | generate | info | plan``.

Each command is a function whose signature tyro turns into flags. Commands import what they need when they run, so that
``mlfs --help`` answers at once; for the same reason this module does without postponed annotations.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mlfs_jax.errors import ConfigError, unknown
from mlfs_jax.registry import ENTRIES, get_entry, resolve_model
from mlfs_jax.terminal import log_to_stderr, print_json, print_table, run_command, set_up_jax, spinner

HELP = """\
usage: mlfs COMMAND ...      (mlfs COMMAND --help lists its options)

Turn one pretrained encoder or decoder into a palette of smaller ones.

  fetch    download models and data of the catalogue, verified; alone: list it
  fit      train a palette: three stages of LoRA on a frozen model; resumable
  palette  measure its subnets: parameters, FLOPs, latency, score; table, plot
  export   write a subnet as a Hugging Face checkpoint, or the adapter for peft
  verify   hold an exported folder against its run: masked == sliced == exported
  generate continue a text with a model, a run, or one of its subnets
  info     what a model, a run or an exported folder is
  plan     bytes, FLOPs, collectives of a step on many devices, without any

examples:
  mlfs fetch minilm-l6 wiki
  mlfs fit --model minilm-l6 --task wiki-topic --out runs/demo --preset demo
  mlfs fit --model minilm-l6 --task my.jsonl --out runs/mine --steps 300 100 100
  mlfs palette runs/demo
  mlfs export runs/demo --subnet quarter --to exported/quarter
  mlfs export runs/demo --subnet heads=6,mlp=736,depth=3 --to exported/mine
  mlfs verify exported/quarter --against runs/demo
  mlfs generate --model smollm2-135m --prompt "The capital of France is"
  mlfs info runs/demo --json
  mlfs plan --model llama-2-7b --mesh fsdp=8 --batch-size 8 --length 1024
  mlfs --print-completion bash (or zsh, tcsh; see your shell's manual)
"""

PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    # minutes on two cores
    "demo": {"steps": (70, 40, 30), "limit": 4000, "max_length": 48, "buckets": (48,), "random_subnets": 1},
}
"""Defaults of ``mlfs fit`` by name; a flag overrides them."""

RunFolder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (verify found a difference), 2 (a mistake), 130 (interrupted)."""
    made = lambda: COMMANDS | {"fit": _fit_from("full"), "generate": _generate_with()}  # noqa: E731
    return run_command(argv, HELP, COMMANDS, _run, prog="mlfs", functions=made, trains=("fit", "palette"))


def _run(command: str, args: list[str]) -> int:
    if command != "fetch" and not {"-h", "--help"} & set(args):
        set_up_jax()
    function: Any = COMMANDS[command]
    if command == "fit":
        function = _fit_from(_preset(args), args)
    elif command == "generate":
        function = _generate_with()
        args = ["--beams" + arg[6:] if arg.partition("=")[0] == "--beam" else arg for arg in args]  # both are said
    config = () if command == "fit" else (tyro.conf.FlagCreatePairsOff,)
    # loading says what it newly initialised: news to the one who fits, noise afterwards
    with log_to_stderr(logging.WARNING if command == "fit" else logging.ERROR):
        return tyro.cli(function, prog=f"mlfs {command}", args=args, config=config) or 0


def fetch(names: Names = (), /, *, check: Flag = False, json: Flag = False) -> None:
    """Download models and data sets into the cache, and verify them.

    Args:
        names: of the catalogue, or hub ids org/name; none: list the catalogue.
        check: of what is in the cache already, compare the sha256 and not only the size.
        json: print the list, or the folders, as JSON and nothing else.
    """
    from mlfs_jax.registry import fetch as fetch_entry
    from mlfs_jax.registry import is_whole

    if not names:
        listed = [
            {"name": e.name, "kind": e.kind, "megabytes": round(e.size / 1e6), "cached": is_whole(e.cached, e)}
            | {"description": e.description, "licence": e.licence}
            for e in ENTRIES
        ]
        if json:
            return print_json(listed)
        for e in listed:
            cached = "cached" if e["cached"] else f"{e['megabytes']} MB"
            print(f"{e['name']:<14} {e['kind']:<6} {cached:>7}  {e['description']} [{e['licence']}]")
    for name in names:
        if "/" not in name:
            get_entry(name)  # a wrong name is said before anything is downloaded
    folders = {}
    for name in names:
        folders[name] = str(resolve_model(name) if "/" in name else fetch_entry(name, verify=check))
        if not json:
            print(f"{name}: {folders[name]}")
    if json:
        print_json(folders)


def _preset(args: list[str]) -> str:
    """The preset among the arguments: it decides the defaults that the real parser shows."""
    for i, arg in enumerate(args):
        name = arg.partition("=")[2] if arg.startswith("--preset=") else None
        if arg == "--preset" and i + 1 < len(args):
            name = args[i + 1]
        if name is not None:
            if name not in PRESETS:
                raise unknown("preset", name, PRESETS)
            return name
    return "full"


def _fit_from(chosen: Any, args: Sequence[str] = ()):
    from mlfs_jax import hosts as processes
    from mlfs_jax.fit_config import FitConfig

    alone, defaults = processes.Hosts(), FitConfig(model=tyro.MISSING, task=tyro.MISSING, **PRESETS[chosen])

    def fit(
        config: Annotated[FitConfig, tyro.conf.arg(name="")] = defaults,
        *,
        out: RunFolder,
        preset: Literal["full", "demo"] = chosen,
        mesh: str | None = None,
        hosts: Annotated[processes.Hosts, tyro.conf.arg(name="")] = alone,
    ) -> int:
        """Train a palette: stage 0 the maxnet, stage 1 widths, stage 2 widths and depths.

        Stop it any time with Ctrl-C or SIGTERM (exit code 0); the same command goes on where it was. A language model
        may also be a .gguf file, its task a .txt file.

        Args:
            out: folder of the run; new, empty, or holding the same run.
            preset: defaults for the other options: full, or demo (minutes on two cores).
            mesh: several devices, e.g. data=2,fsdp=4,tensor=1: copies, split weights, split layers. A run may go on
                with another one.
        """
        from mlfs_jax.sharding import make_mesh
        from mlfs_jax.train import fit as train

        work = lambda: train(config, out, mesh=None if mesh is None else make_mesh(mesh))  # noqa: E731
        return processes.run_job(hosts, "mlfs_jax.cli", ["fit", *args], work)

    return fit


def palette(
    run: RunFolder,
    /,
    *,
    all: Flag = False,
    subnets: Names = (),
    split: str | None = None,
    length: int | None = None,
    batch_sizes: tuple[int, ...] = (1, 32),
    json: Flag = False,
) -> None:
    """Measure the subnets of a finished run; writes palette.json and palette.png into its folder.

    Args:
        run: folder of the run.
        all: every uniform subnet of the space, not only the named ones.
        subnets: only these: names, or sizes such as heads=6,mlp=736,depth=3; the files then hold no others.
        split: of the task; the default is test where there is one, else validation.
        length: tokens of a sequence, for FLOPs and latency; the default is what the run cuts texts to.
        batch_sizes: to measure latency at.
        json: print the numbers as JSON and nothing else.
    """
    from mlfs_jax.palette import all_subnets, measure
    from mlfs_jax.train import load_run

    if all and subnets:
        raise ConfigError("--all and --subnets exclude each other: give one of them.")
    fitted = load_run(run, finished=True)
    chosen = all_subnets(fitted) if all else subnets or None
    with spinner() as advance:
        measured = measure(fitted, chosen, split=split, length=length, batch_sizes=batch_sizes, advance=advance)
    if json:
        print_json(measured.to_json())
    else:
        print_table(measured.table())
    files = measured.save(run), measured.plot(run / "palette.png")  # after: what was measured is not lost with them
    if not json:
        print("wrote " + " and ".join(map(str, files)))


def export(
    run: RunFolder,
    /,
    *,
    to: Folder,
    subnet: str | None = None,
    peft: Flag = False,
    gguf_type: Literal["f16", "bf16", "q8_0", "f32"] = "f16",
) -> None:
    """Write a subnet of a finished run as a Hugging Face checkpoint: config, safetensors, tokenizer, model card.

    Args:
        run: folder of the run.
        to: folder to write, or a file that ends in .gguf, for llama.cpp; an earlier export there is replaced.
        subnet: its name (mlfs info RUN lists them), or sizes such as heads=6,mlp=736,depth=3.
        peft: write the adapter of the maxnet in the format of peft instead, for the unchanged pretrained model.
        gguf_type: of the matrices in a .gguf file.
    """
    from mlfs_jax.export import export_adapter, export_subnet, export_subnet_gguf
    from mlfs_jax.hf.gguf import gguf_in
    from mlfs_jax.palette import Palette
    from mlfs_jax.train import load_run

    if peft and subnet not in (None, "maxnet"):
        raise ConfigError(f"--peft --subnet {subnet}: an adapter belongs to the whole model; leave --subnet out.")
    if not peft and subnet is None:
        raise ConfigError("--subnet is missing: give a name such as quarter, or sizes (`mlfs info RUN` lists them).")
    gguf = to.suffix.lower() == ".gguf"
    if peft and gguf:
        raise ConfigError(f"--peft --to {to}: an adapter is a folder; leave --peft out for a .gguf file.")
    if gguf_type != "f16" and not gguf:
        raise ConfigError(f"--gguf-type {gguf_type}: {to} is no file that ends in .gguf; name one, or leave it out.")
    fitted = load_run(run, finished=True)
    if peft:
        written = export_adapter(fitted, to)
        print(f"{to}: adapter of rank {written.rank}, {written.params:,} parameters")
        if gguf_in(resolve_model(fitted.config.model)) is not None:
            print("  Its base is a GGUF file, which peft does not open by itself: load that with transformers'")
            print("  from_pretrained(..., gguf_file=...), or the checkpoint that it was made from; then the adapter.")
        return
    if gguf:
        file = export_subnet_gguf(fitted, subnet, to, gguf_type)
        print(f"{to}: {subnet}, {file.parameters:,} parameters, {file.nbytes / 1e6:.1f} MB")
        for sentence in file.why:
            print(f"  {sentence}")
        return
    report = export_subnet(fitted, subnet, to, run=run.absolute().name, palette=Palette.load(run))
    print(f"{to}: {subnet}, {report.params_after:,} parameters; {', '.join(report.files)}")
    for sentence in report.why:
        print(f"  {sentence}")
    if report.why:
        print(f"  That is {report.params_after - report.params_before:,} parameters more than the subnet itself has.")


def verify(directory: Folder, /, *, against: RunFolder, json: Flag = False) -> int:
    """Compare an exported folder with its run; exit code 1 when something disagrees.

    Args:
        directory: the exported folder.
        against: folder of the run it came from.
        json: print the checks as JSON and nothing else.
    """
    import dataclasses

    from mlfs_jax.train import load_run
    from mlfs_jax.verify import all_ok, table
    from mlfs_jax.verify import verify as check

    checks = check(directory, load_run(against, finished=True))
    if json:
        print_json({"ok": all_ok(checks), "checks": [dataclasses.asdict(c) for c in checks]})
    else:
        print_table(table(checks))
        print(f"{directory} {'is what' if all_ok(checks) else 'is NOT what'} {against} learnt")
    return 0 if all_ok(checks) else 1


def _generate_with():
    from mlfs_jax.generate import GREEDY, GenerateConfig, generate_text, stream_text

    def generate(
        config: Annotated[GenerateConfig, tyro.conf.arg(name="")] = GREEDY,
        *,
        model: str,
        prompt: str,
        subnet: str | None = None,
        chat: Flag = False,
        seed: int = 0,
        mesh: str | None = None,
    ) -> None:
        """Continue a text.

        Args:
            model: a name of the catalogue, a model folder, a GGUF file, a hub id, or the folder of a finished run.
            prompt: the text.
            subnet: a name such as half, or sizes such as heads=3,mlp=736,depth=15; the default is the whole model.
            chat: the prompt is what a user says: put it into the model's chat template.
            seed: of random sampling.
            mesh: several devices, as for mlfs fit: tensor=N splits heads and neurons, fsdp=N all weights.
        """
        from mlfs_jax.load import load_subnet
        from mlfs_jax.sharding import make_mesh

        network = load_subnet(model, subnet, mesh=None if mesh is None else make_mesh(mesh))
        pieces: Iterable[str]
        if config.beams > 1:
            pieces = generate_text(network, [prompt], config, chat=chat)
        else:
            pieces = stream_text(network, prompt, config, key=seed, chat=chat)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    return generate


def info(thing: Annotated[str, tyro.conf.arg(metavar="THING")], /, *, json: Flag = False) -> None:
    """What a model, a run or an exported folder is: shapes, parameters per part, adapters per stage, licence.

    Args:
        thing: a name of the catalogue, a model folder, a hub id, a run folder, or an exported folder.
        json: print it as JSON and nothing else.
    """
    from mlfs_jax.info import describe, lines

    described = describe(thing)
    if json:
        print_json(described)
    else:
        print("\n".join(lines(described)))


def plan(
    *,
    model: str,
    mesh: str = "data=1",
    batch_size: int = 8,
    length: int | None = None,
    stage: Literal[0, 1, 2] = 0,
    rank: int = 8,
    random_subnets: int = 2,
    execution: Literal["sliced", "masked"] = "sliced",
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Flag = False,
    memory: str | None = None,
    json: Flag = False,
) -> None:
    """What a training step needs on every device: compiled for virtual ones, without weights or an accelerator.

    Args:
        model: a published shape such as llama-2-7b, a config.json or a folder with one, or a name of the catalogue.
        mesh: of as many devices as you like, e.g. data=2,fsdp=4,tensor=1: copies, split weights, split layers.
        batch_size: examples in a step, on all devices together.
        length: tokens of an example; the default is 1024, or as many as the model has positions for.
        stage: 0 trains the maxnet (plain LoRA); 1 and 2 subnets beside it.
        rank: of the low-rank pairs.
        random_subnets: n of the sandwich rule: maxnet, minnet and n random subnets.
        execution: of subnets.
        dtype: of the frozen base, in which the step computes.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        memory: of a device, e.g. 80GiB; where that is too little, the knobs that help are tried.
        json: print the numbers as JSON and nothing else.
    """
    from mlfs_jax.fit_config import FitConfig
    from mlfs_jax.knobs import Setting, knobs_table, parse_bytes, plan_and_turn, table, use_virtual_devices, work_table
    from mlfs_jax.plan import ESTIMATE
    from mlfs_jax.published import config_of
    from mlfs_jax.sharding import mesh_sizes

    fields: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "random_subnets": random_subnets,
        "execution": execution,
    }
    limit = None if memory is None else parse_bytes(memory)
    config = config_of(model)
    length = min(1024, config.context) if length is None else length
    setting = Setting(mesh_sizes(mesh), FitConfig(model, "", **fields, dtype=dtype, remat=remat), length)
    use_virtual_devices(setting.devices)
    with spinner("compiling") as advance:
        planned, knobs = plan_and_turn(config, setting, stage, limit, advance)
    fits = limit is None or planned.peak <= limit
    if json:
        found = {"model": model, **planned.to_json()}
        if limit is not None:
            found |= {"memory": limit, "fits": fits, "instead": {typed: p.peak for typed, p in knobs.items()}}
        return print_json(found)
    title = f"{model}, stage {stage}, {batch_size} x {length} tokens on {setting.devices} devices ({setting.mesh_spec})"
    print_table(table(planned, title))
    print_table(work_table(planned))
    print("\n".join([*planned.whole, ESTIMATE]))
    if limit is not None:
        print(f"That {'fits' if fits else 'does NOT fit'} in {memory}.")
    if not fits:
        print_table(knobs_table(knobs, limit))


COMMANDS = {"fetch": fetch, "fit": None, "palette": palette, "export": export, "verify": verify}
COMMANDS |= {"generate": None, "info": info, "plan": plan}


if __name__ == "__main__":
    sys.exit(main())
