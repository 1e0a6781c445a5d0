"""`tokgen`: train, use and check tokenizers and generators from the command line.

`tokgen fit|validate|test|predict` is Lightning's CLI with several -c files (what x where); the other commands take the
same kind of options and --config files. A mistake of the user's ends with one line and code 2; `--debug` shows where.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from tokgen.commands.analyze import analyze
from tokgen.commands.codes import check, decode, encode
from tokgen.commands.convert import convert
from tokgen.commands.data import features, motion, pack, tokenize, trajectories
from tokgen.commands.evaluate import compare, evaluate
from tokgen.commands.plan import plan
from tokgen.commands.sample import sample
from tokgen.errors import TokgenError

TRAINING = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        pack, tokenize, features, motion, trajectories, encode, decode, sample, check, evaluate, compare, analyze, convert,
    )
}  # fmt: skip
POSITIONAL = {
    "pack": ["source"], "tokenize": ["shards"], "features": ["shards"], "motion": ["source"],
    "trajectories": ["videos", "out"], "encode": ["files"], "decode": ["tokens"],
    "sample": ["prompts"], "analyze": ["codes"], "check": ["target"], "evaluate": ["what", "model"], "compare": ["reports"],
    "convert": ["family", "checkpoint"],
}  # fmt: skip


def _parser(name: str) -> Any:
    from docstring_parser import parse
    from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

    positional = POSITIONAL[name]
    function = COMMANDS[name]
    parser = ArgumentParser(prog=f"tokgen {name}", description=(function.__doc__ or "").split("\n\n")[0].strip())
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with any of the options below")
    hints = typing.get_type_hints(function)
    helps = {p.arg_name: p.description for p in parse(function.__doc__ or "").params}
    for key, parameter in inspect.signature(function).parameters.items():
        options: dict[str, Any] = {"type": hints[key], "help": helps.get(key, "")}
        if key in positional:
            if typing.get_origin(hints[key]) is list:
                options.update(type=typing.get_args(hints[key])[0], nargs="+")
            parser.add_argument(key, **options)
        elif parameter.default is inspect.Parameter.empty:
            parser.add_argument(f"--{key}", required=True, **options)
        elif hints[key] is bool:  # --text, --text false, --no_text
            parser.add_argument(
                f"--{key}", default=parameter.default, action=ActionYesNo, nargs="?", help=options["help"]
            )
        elif hints[key] == (list[str] | None):
            parser.add_argument(f"--{key}", default=parameter.default, **{**options, "type": str, "nargs": "+"})
        else:
            parser.add_argument(f"--{key}", default=parameter.default, **options)
    return parser


def _usage() -> str:
    lines = ["usage: tokgen COMMAND [OPTIONS]   (tokgen COMMAND --help says more)", ""]
    lines.append("  fit          Train: tokgen fit -c tokenizers/vqgan-tiny.yaml -c train/cpu.yaml")
    lines.append("  validate, test, predict   The same with a checkpoint: --ckpt_path PATH")
    lines.append(f"  plan         {(plan.__doc__ or '').splitlines()[0]}")
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", "  --debug      Show the traceback of an error", "  --version"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, or 2 after a mistake that one line explains)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or bool(os.environ.get("TOKGEN_DEBUG"))
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        import tokgen

        print(f"tokgen {tokgen.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS and name not in (*TRAINING, "plan"):
        known = ", ".join([*TRAINING, "plan", *COMMANDS])
        print(f"tokgen: unknown command {name!r}; expected one of {known}", file=sys.stderr)
        return 2
    try:
        if name in TRAINING:
            from tokgen.training.lightning_cli import run

            run(name, rest)
        elif name == "plan":  # takes settings of a run too, and several -c files
            plan(rest)
        else:
            values = _parser(name).parse_args(rest).as_dict()
            values.pop("config", None)
            COMMANDS[name](**values)
    except KeyboardInterrupt:
        print("tokgen: interrupted", file=sys.stderr)
        return 130
    except (TokgenError, OSError, ValueError) as error:
        if debug:
            raise
        print(f"tokgen {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
