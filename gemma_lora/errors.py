"""The one exception a user is meant to read, and what its messages name: choices, a command."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message says what was got, what was expected and the nearest valid choices.

    Entry points print it as one line, without a traceback, and exit with status 2.
    """


def extra(name: str) -> str:
    """The command that installs an extra, in the versions that were tested."""
    return f"pip install -c constraints.txt -e '.[{name}]'"


def nearest(got: str, valid: Iterable[str]) -> str:
    """'did you mean a, b? (valid: ...)' for an unknown name; lists at most a dozen names."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(got), valid, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    more = f", ... {len(valid) - 12} more" if len(valid) > 12 else ""
    return f"{hint}(valid: {', '.join(valid[:12])}{more})"


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs an entry point; a UserError, what the system says of a file or disk, or that a device's
    memory is too small becomes 'error: ...' on stderr and exit status 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except OSError as e:  # of a file or disk: unreadable, gone, full (which names no file)
        if not e.filename and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{e.filename}: " if e.filename else ""
        print(f"error: {where}{e.strerror}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as e:  # of JAX, of which this module imports nothing
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(
            f"error: the memory of a device does not suffice: {str(e).splitlines()[0]}; a "
            "smaller data.batch_size or data.seq_len needs less, as do, in training, more "
            "train.micro_batches, remat=full or quantize=int8; python -m gemma_lora.plan says how "
            "much",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    raise SystemExit(0)
