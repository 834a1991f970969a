"""Makes scripts report errors in one line, perhaps with a hint, instead of a traceback. Importing
it is enough; DROPPATH_DEBUG=1 shows the traceback. Shared by the scripts here and the programs in
dev/; uses only the standard library."""
import atexit
import os
import subprocess
import sys


def in_words(kind, error, trace):
    """The message for an exception that the script did not foresee; "" if there is nothing to
    print."""
    what = " ".join(str(error).split())[:200]
    if issubclass(kind, KeyboardInterrupt):
        return "\ninterrupted"
    if issubclass(kind, BrokenPipeError):
        return ""                                       # the reader is gone, as after `| head`
    if issubclass(kind, ImportError) and getattr(error, "name", None):
        package = error.name.split(".")[0]
        return (f"error: the Python library {package} is missing\n"
                f"  hint: in a virtual environment: python3 -m pip install {package}")
    if issubclass(kind, OSError) and error.strerror:
        return f"error: {error.filename or 'the disk'}: {error.strerror}"
    if issubclass(kind, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        return f"error: {command[:200]} ended with code {error.returncode}"
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = ""
    if trace:
        place = f", {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
    return (f"error: unexpected {kind.__name__}{': ' if what else ''}{what}{place}\n"
            "  hint: DROPPATH_DEBUG=1 shows the traceback; please include it in a report")


def last_resort(kind, error, trace):
    if os.environ.get("DROPPATH_DEBUG"):
        return sys.__excepthook__(kind, error, trace)
    words = in_words(kind, error, trace)
    if words:
        print(words, file=sys.stderr)


def flush():
    """The final flush may find no reader, or a full disk, which Python would report in its own
    way."""
    try:
        sys.stdout.flush()
    except OSError as e:
        if not isinstance(e, BrokenPipeError):
            print(f"error: standard output: {e.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # discards what is pending


sys.excepthook = last_resort
atexit.register(flush)
