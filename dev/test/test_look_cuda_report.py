"""Tests of dev/test/cuda_report.py, on what ptxas and cuobjdump print, shortened."""
import os
import subprocess
import sys
import unittest

import real_runs

sys.path.insert(0, os.path.join(real_runs.ROOT, "dev", "test"))
import cuda_report                                      # noqa: E402

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4axpyIfLi4EEvPT_f' for 'sm_90'
ptxas info    : Function properties for _Z4axpyIfLi4EEvPT_f
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_90'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""

SASS = """
	code for sm_90
		Function : _Z4axpyIfLi4EEvPT_f
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;    /* 0x1 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x2 */
        /*0030*/                   FFMA R4, R4, R0, R5 ;               /* 0x3 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;   /* 0x4 */
        /*0050*/               @P0 STG.E.128 desc[UR4][R2.64], R4 ;    /* 0x5 */
        /*0060*/              @!P1 BRA 0x20 ;                          /* 0x6 */
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;        /* 0x7 */
        /*0080*/                   BRA 0x80;                           /* 0x8 */
		Function : _Z3onePf
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;        /* 0x1 */
        /*0010*/                   EXIT ;                              /* 0x2 */
"""


class CudaReport(unittest.TestCase):
    def test_reads_ptxas(self):
        self.assertEqual(cuda_report.usage(PTXAS), {"_Z4axpyIfLi4EEvPT_f": [40, 20, 16],
                                                    "_Z3onePf": [8, 0, 0]})

    def test_reads_machine_code(self):
        code = cuda_report.code(SASS)
        # five instructions of the loop load 32 bytes; the jump to itself at the end is no loop
        self.assertEqual(cuda_report.facts(code["_Z4axpyIfLi4EEvPT_f"]), [9, "2/3", "1/2", 2])
        self.assertEqual(cuda_report.facts(code["_Z3onePf"]), [2, "0/1", "0/0", 8])
        self.assertEqual(cuda_report.facts([]), [0, "0/0", "0/0", None])

    def test_tells(self):
        folder = real_runs.folder()
        files = {"ptxas.txt": PTXAS, "kernels.cubin": "", "empty.txt": "",
                 "cuobjdump": f"#!/bin/sh\ncat <<'END'\n{SASS}\nEND\n"}
        path = {name: os.path.join(folder, name) for name in files}
        for name, text in files.items():
            with open(path[name], "w", encoding="utf-8") as file:
                file.write(text)
        os.chmod(path["cuobjdump"], 0o755)

        def report(*arguments, **more):
            return subprocess.run([sys.executable, "dev/test/cuda_report.py", *arguments],
                                  cwd=real_runs.ROOT, capture_output=True, text=True,
                                  env={**os.environ, **more})

        whole = report(path["ptxas.txt"], path["kernels.cubin"], CUOBJDUMP=path["cuobjdump"])
        self.assertEqual(whole.returncode, 1)            # a kernel spills
        self.assertIn("2 kernels, 20 bytes spilled", whole.stdout)
        self.assertRegex(whole.stdout, r"\n +40 +20 +16 +9 +2/3 +1/2 +2  (axpy<float, 4>|_Z4axpy)")
        short = report(path["ptxas.txt"])
        self.assertNotIn("loop", short.stdout)
        for bad, part in ((path["empty.txt"], "names no kernel"), ("/no/such", "cannot read")):
            said = report(bad)
            self.assertIn(part, said.stderr)
            self.assertNotIn("Traceback", said.stderr)
        said = report(path["ptxas.txt"], path["kernels.cubin"], CUOBJDUMP="/no/such")
        self.assertIn("cannot run /no/such", said.stderr)


if __name__ == "__main__":
    unittest.main()
