"""No exception of a Python program escapes as a traceback: bad options, missing files, closed
pipes, full disks, Ctrl-C."""
import glob
import os
import subprocess
import sys
import tempfile
import unittest

import real_runs

PROGRAMS = [os.path.relpath(path, real_runs.ROOT) for path in sorted(
    glob.glob(f"{real_runs.ROOT}/scripts/*.py") + glob.glob(f"{real_runs.ROOT}/data/*.py") +
    glob.glob(f"{real_runs.ROOT}/dev/*/*.py")) if "__main__" in open(path, encoding="utf-8").read()]
TESTS = ("dev/test/test_",)                             # unittest's own


def python(*arguments, **more):
    """Runs a program of ours; its exit code and what it said on its standard error."""
    done = subprocess.run([sys.executable, *arguments], cwd=real_runs.ROOT, stderr=subprocess.PIPE,
                          text=True, timeout=300,
                          **{"stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL, **more})
    return done.returncode, done.stderr


class Errors(unittest.TestCase):
    def short(self, said, *wanted):
        """A line or two, and no page of insides."""
        self.assertNotIn("Traceback", said)
        self.assertNotIn("Exception ignored", said)
        for part in wanted:
            self.assertIn(part, said)

    def test_every_program(self):
        programs = [p for p in PROGRAMS if not p.startswith(TESTS)]
        self.assertGreater(len(programs), 10)
        none = os.path.join(real_runs.folder(), "there", "is", "none")
        for program in programs:
            for arguments in (["--no-such-option"], [none], ["--out", "/dev/null/x", "/dev/null"]):
                with self.subTest(program=program, arguments=arguments):
                    # else it waits for the run
                    once = ["--once"] if program.endswith("tensorboard.py") else []
                    code, said = python(program, *once, *arguments)
                    self.short(said)
                    self.assertNotEqual(code, 0, said)

    def raised(self, statement, **more):
        """What a script says of an exception that it did not foresee."""
        return python("-c", f"import sys; sys.path.append('scripts'); import "
                      f"script_errors\n{statement}", **more)

    def test_what_nobody_foresaw(self):
        for statement, want in (
                ("raise KeyError('a')", "error: unexpected KeyError: 'a', <string>:2\n  hint: "
                 "DROPPATH_DEBUG=1"),
                ("open('/dev/null/x')", "error: /dev/null/x: Not a directory\n"),
                ("import nonexistent.part", "error: the Python library nonexistent is missing\n"),
                ("import subprocess; subprocess.run(['false'], check=True)",
                 "error: false ended with code 1\n"),
                ("import json; json.loads('{')", "error: unexpected JSONDecodeError: "),
                ("raise KeyboardInterrupt", "\ninterrupted\n")):
            code, said = self.raised(statement)
            self.short(said, want)
            self.assertNotEqual(code, 0)
        self.assertIn("Traceback",
                      self.raised("1 / 0", env={**os.environ, "DROPPATH_DEBUG": "1"})[1])

    def test_nobody_reads(self):
        for statement in ("print('a')", "print('a' * 100000)", "print('a', flush=True)"):
            read, write = os.pipe()
            os.close(read)
            code, said = self.raised(statement, stdout=write)
            os.close(write)
            self.assertEqual(said, "", statement)
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                self.short(self.raised("print('a')", stdout=full)[1], ": No space left on device\n")

    @unittest.skipUnless(real_runs.have("numpy"), "data/ needs numpy")
    def test_nobody_reads_data(self):
        with tempfile.TemporaryDirectory() as folder:
            text = os.path.join(folder, "a.txt")
            with open(text, "w", encoding="utf-8") as file:
                file.write("a text\n" * 100)
            read, write = os.pipe()
            os.close(read)
            code, said = python("data/prepare.py", "--tokenizer", "bytes", "--processes", "1",
                                "--out", os.path.join(folder, "d"),
                                text, stdout=write)
            os.close(write)
            self.short(said)
            self.assertNotIn("Broken pipe", said)


if __name__ == "__main__":
    unittest.main()
