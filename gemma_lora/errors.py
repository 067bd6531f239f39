"""The one exception a user is meant to read, what its messages name (choices, a command), and the
command lines that raise it."""

import argparse
import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn


class UserError(ValueError):
    """Bad input. The message says what was got, what was expected and the nearest valid choices.

    Entry points print it as one line, without a traceback, and exit with status 2.
    """


def extra(name: str) -> str:
    """The command that installs an extra, in the versions that were tested."""
    return f"pip install -c constraints.txt -e '.[{name}]'"


def one_line(e: Exception) -> str:
    """The message of an exception of someone else's on one line of at most 300 characters, or its
    name where it has none."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def nearest(got: str, valid: Iterable[str]) -> str:
    """'did you mean a, b? (valid: ...)' for an unknown name; lists at most a dozen names."""
    valid = sorted(str(x) or "''" for x in valid)
    close = difflib.get_close_matches(str(got), valid, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    more = f", ... {len(valid) - 12} more" if len(valid) > 12 else ""
    return f"{hint}(valid: {', '.join(valid[:12])}{more})"


def require_name(what: str, got: Any, valid: Iterable[str]) -> None:
    """Raises UserError where `got` is none of the valid names of a setting, `what`."""
    if got not in valid:
        raise UserError(f"{what} {got!r} is unknown, {nearest(got, valid)}")


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors; --help shows the module's docstring.

    module: the name of the module that `python -m` runs, doc: its docstring; elsewhere: flags that
    were taken off the command line before.
    """

    def __init__(
        self, module: str = "", doc: str = "", elsewhere: tuple[str, ...] = (), **settings: Any
    ):
        self._elsewhere = elsewhere
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's; names the flag that is unknown before one that it may have been."""
        args = sys.argv[1:] if args is None else args
        for name in (arg.partition("=")[0] for arg in args):
            if name.startswith("--") and name not in ("--", *self._option_string_actions):
                flags = [x for x in self._option_string_actions if x.startswith("--")]
                near = nearest(name, (*flags, *self._elsewhere))
                raise UserError(f"command line: {name} is unknown, {near}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs an entry point; a UserError, what the system says of a file or disk, or that a memory is
    too small becomes 'error: ...' on stderr and exit status 2."""
    try:
        main()
    except UserError as e:
        _fail(str(e))
    except OSError as e:  # of a file or disk: unreadable, gone, full (which names no file)
        if not e.filename and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{e.filename}: " if e.filename else ""
        _fail(f"{where}{e.strerror}")
    except MemoryError as e:
        _fail(f"the memory of this host does not suffice: {str(e) or 'no more was given'}")
    except RuntimeError as e:  # of JAX, of which this module imports nothing
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        _fail(
            f"the memory of a device does not suffice: {str(e).splitlines()[0]}; a "
            "smaller data.batch_size or data.seq_len needs less, as do, in training, more "
            "train.micro_batches, remat=full or quantize=int8; python -m gemma_lora.plan says how "
            "much"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
