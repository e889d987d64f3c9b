"""Commands about programs, passes, machines and models; they load neither torch nor a simulator before they must."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Annotated

import typer

from typebar.host.cli_output import print_facts, print_json, print_table, read_text, write_file
from typebar.isa.errors import TypebarError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def machines(as_json: Json = False) -> None:
    """List the machines that come with Typebar, and their parameters."""
    from typebar.isa.machine import Machine, shipped_machines

    found = [Machine.load(name) for name in shipped_machines()]
    if as_json:
        hashes = [{"contract_hash": m.contract_hash(), "timing_hash": m.timing_hash()} for m in found]
        print_json([m.to_mapping() | h for m, h in zip(found, hashes, strict=True)])
        return
    rows = [
        (
            m.name,
            m.clock_mhz,
            f"{m.matrix.lanes} x {m.matrix.columns} x {m.matrix.rows}",
            m.vector.lanes,
            f"{m.hbm_bytes_per_second / 1e9:.1f}",
            f"{m.hbm.capacity_bytes / 2**30:g}",
            m.attention_block,
            m.description,
        )
        for m in found
    ]
    header = ("name", "MHz", "lanes x columns x rows", "vector", "HBM GB/s", "HBM GiB", "block", "description")
    print_table("Machines (--json has every parameter)", header, rows, numbers=(1, 3, 4, 5, 6))


def models(as_json: Json = False) -> None:
    """List the models known by name: those that come with Typebar, and others' that install as packages."""
    from typebar.models import shipped
    from typebar.models.real import real_models

    found, real = shipped(), [(model, model.installed()) for model in real_models()]
    if as_json:
        listed = [asdict(m) | {"path": str(m.path), "shipped": True} for m in found]
        listed += [asdict(m) | {"path": None if path is None else str(path), "shipped": False} for m, path in real]
        print_json(listed)
        return
    rows = [(m.name, f"{m.parameters:,}", f"{m.held_out_nats_per_byte:.3f}", m.licence, m.description) for m in found]
    header = ("name", "parameters", "held-out nats/byte", "licence", "description")
    print_table("Models that come with Typebar", header, rows, numbers=(1, 2))
    rows = [(m.name, f"{m.parameters:,}", m.licence, m.description, "yes" if path else m.install) for m, path in real]
    header = ("name", "parameters", "licence", "description", "installed, or how to")
    print_table("Other people's models", header, rows, numbers=(1,))


def disasm(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image.")],
    as_json: Json = False,
) -> None:
    """Print an image's program as assembly text, with its labels and comments."""
    from typebar.isa.image import Image
    from typebar.isa.program import disassemble, encode

    with Image.open(image, verify=False) as opened:
        text = disassemble(opened.program)
        if as_json:
            digest = hashlib.sha256(encode(opened.program).tobytes()).hexdigest()
            count = len(opened.program)
            print_json({"instructions": count, "entries": opened.manifest.entries, "sha256": digest, "text": text})
        else:
            print(text, end="")


def asm(
    file: Annotated[str, typer.Argument(metavar="FILE", help='Assembly text; "-" is standard input.')],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the binary words here.")] = None,
    as_json: Json = False,
) -> None:
    """Assemble text into instruction words of 64 bytes; without -o only check it."""
    from typebar.isa.program import assemble, encode

    program = assemble(read_text(file, "assembly file"))
    if not program.ops:
        raise TypebarError(f"assembly file {file!r} has no instructions: give at least one, such as halt")
    words = encode(program).tobytes()
    if output is not None:
        write_file(output, words)
    facts = {
        "instructions": len(program),
        "labels": len(program.labels),
        "bytes": len(words),
        "sha256": hashlib.sha256(words).hexdigest(),
        "output": output,
    }
    if as_json:
        print_json(facts)
    else:
        rows = [(key, value) for key, value in facts.items() if value is not None]
        print_facts("Assembled", rows)


def opt(
    file: Annotated[str, typer.Argument(metavar="FILE", help='Textual IR; "-" is standard input.')] = "-",
    passes: Annotated[str, typer.Option("--passes", "-p", help="Pass names in order, separated by commas.")] = "",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write here, not to standard output.")] = None,
    list_passes: Annotated[bool, typer.Option("--list", help="List the passes.")] = False,
    as_json: Json = False,
) -> None:
    """Run compiler passes on textual IR; without passes, only check and reprint it."""
    from typebar.compiler.pipeline import PASSES, run_passes

    if list_passes:
        notes = {name: (made.__doc__ or "").strip().split("\n")[0] for name, made in PASSES.items()}
        if as_json:
            print_json([{"name": name, "summary": summary} for name, summary in notes.items()])
        else:
            print_table("Passes, in the order in which they lower", ("name", "what it does"), notes.items())
        return
    text = run_passes(read_text(file, "IR file"), split_passes(passes))
    if output is not None:
        write_file(output, text.encode())
    elif as_json:
        print_json({"passes": split_passes(passes), "text": text})
    else:
        print(text, end="")


def split_passes(text: str) -> list[str]:
    """Pass names at the commas outside braces.

    Raises:
        TypebarError: braces that do not pair up, or an empty name.
    """
    names, depth = [""], 0
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    if depth:
        raise TypebarError(f"--passes {text!r}: braces do not pair up")
    names = [name.strip() for name in names]
    if names == [""]:
        return []
    if "" in names:
        raise TypebarError(f"--passes {text!r} has an empty name: separate names by single commas")
    return names


def unary_errors(as_json: Json = False) -> None:
    """Measure the largest error of each unary function; takes about ten seconds."""
    from typebar.isa.numerics.unary_errors import unary_error_report

    found = [asdict(item) | {"function": item.function.name.lower()} for item in unary_error_report()]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            item["function"],
            item["inputs"],
            f"{item['ulp']:.3f}",
            f"{item['at']:.6g}",
            f"{item['ulp_above_floor']:.3f}",
            f"{item['relative']:.2e}",
            f"{item['absolute']:.2e}",
        )
        for item in found
    ]
    header = ("function", "inputs", "ULP", "at", "ULP, |y| >= 2^-24", "relative", "absolute")
    print_table("Largest errors of the unary functions", header, rows, numbers=(2, 3, 4, 5, 6))
