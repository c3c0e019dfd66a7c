"""What the flash-attn tool says: of wrong command lines, in its help, and of calls it is asked about.

usage: tool_test.py TOOL
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unittest

TOOL = ""
COMMANDS = ("info", "explain", "verify", "bench", "bench limit")


def call(words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *words.split()], capture_output=True, text=True)


# A command line, and what is said of it after "flash-attn".
REFUSED = {
    "": ": expected a command: info, explain, verify, bench (--help describes them)",
    "bench": " bench: expected a command: limit (--help describes them)",
    "explian": ": unknown command explian; did you mean explain? (it has info, explain, verify, bench)",
    "frobnicate": ": unknown command frobnicate (it has info, explain, verify, bench)",
    "bench limt": " bench: unknown command limt; did you mean limit? (it has limit)",
    "explain causal": " explain: unexpected word causal",
    "verify --filtr x": " verify: unknown option --filtr; did you mean --filter?",
    "--bogus": ": unknown option --bogus",
    "verify --dtype fp64": " verify: --dtype: fp64 not in {fp32,bf16,fp16}",
    "verify --filter nothing-like-it": ": --filter: no feature contains nothing-like-it",
    "verify --backend cqu": ": --backend: expected one of {usable}, got cqu",
    "bench limit --threads 0": " bench limit: --threads: expected an integer of at least 1, got 0",
    "bench limit --threads two": " bench limit: --threads: expected an integer of at least 1, got two",
    "bench limit --threads": " bench limit: --threads: expected a value",
    "bench limit --seconds -1": " bench limit: --seconds: expected a number above 0, got -1",
    "explain --headdim 0": " explain: --headdim: expected an integer of at least 1, got 0",
    "explain --nheads 99999999999": " explain: --nheads: expected an integer of at least 1, got 99999999999",
    "explain --dropout 1": " explain: --dropout: expected a probability in [0, 1), got 1",
    "explain --softcap nan": " explain: --softcap: expected a number above 0, got nan",
    "explain --window 3": ": --window: expected LEFT,RIGHT, got 1 values",
    "explain --window 3,4,5": ": --window: expected LEFT,RIGHT, got 3 values",
    "explain --lengths-q 3,4 --lengths-k 3": ": --lengths-k: expected 2 values, one for each sequence, got 1",
    "explain --batch 2 --seqused-k 1,2,3": ": --seqused-k: expected 1 or 2 values, one for each sequence, got 3",
    "explain --lengths-q 2147483647,5": ": --lengths-q: 2147483652 is more than an int32 holds",
    "explain --batch 1048576 --nheads 1048576": ": a tensor of 1024 PiB is beyond the address space",
    "explain --rotary-dim 64": ": --rotary-dim: needs --new-keys or --lengths-new",
    "explain --new-keys 1 --lengths-new 1": ": --new-keys: not together with --lengths-new",
    "explain --new-keys 1 --backward": ": --backward: not together with --new-keys or --lengths-new",
    "explain --page-size 16 --lengths-k 5": (
        ": --lengths-k: not together with --page-size; --seqused-k gives the keys of each sequence"
    ),
    "explain --seqused-k 5000": ": seqused_k[0]: expected 0 <= entry <= the rows of the sequence = 4096, got 5000",
}

# Options of explain, and what its description of the call has to contain.
ASKED = {
    "": "batch 1, 16 heads, headdim 128, seqlen 4096 x 4096",
    "--batch 0": "batch 0",
    "--seqlen-k 0": "seqlen 0 x 0",
    "--nheads 6 --nheads-k 2 --headdim-v 64 --dtype fp32": "float32",
    "--lengths-q 5,6": "seqlen up to 6 x 6, packed",
    "--lengths-q 5,6 --lengths-k 7,0 --causal": "seqlen up to 6 x 7, packed, causal",
    "--bias keys": "bias",
    "--bias keys --lengths-q 5,6": "seqlen up to 6 x 6, packed, bias",
    "--bias full --lengths-q 5,6 --lengths-k 7,9": "seqlen up to 6 x 9, packed, bias",
    "--bias heads --batch 3": "bias",
    "--bias full --page-size 100 --seqlen-k 250 --seqlen-q 2": "pages of 100, seqused_k, bias",
    "--bias keys --cache-batch-idx 3,1": "cache_batch_idx, bias",
    "--seqused-k 100 --batch 3": "seqused_k",
    "--seqused-q 5,6 --batch 2 --seqlen-q 8": "seqused_q",
    "--leftpad-k 3,5 --batch 2": "leftpad",
    "--page-size 16 --batch 2": "pages of 16, seqused_k",
    "--page-size 5 --lengths-q 3,1 --seqused-k 7,90 --seqlen-k 90": "packed, pages of 5, seqused_k",
    "--cache-batch-idx 3,1 --seqlen-q 1": "cache_batch_idx",
    "--new-keys 1": "seqlen up to 1 x 4096, seqused_k, 1 new keys",
    "--new-keys 1 --batch 2 --seqused-k 100,3000": "seqlen up to 1 x 3001, seqused_k, 1 new keys",
    "--new-keys 2 --lengths-q 3,1 --page-size 16": "packed, pages of 16, seqused_k, 2 new keys",
    "--lengths-new 2,5 --lengths-q 3,1": "packed, seqused_k, new keys",
    "--new-keys 1 --rotary-dim 64 --page-size 16 --causal": "1 new keys, rotary 64, causal",
    "--new-keys 1 --rotary-dim 64 --rotary-interleaved --cache-batch-idx 1,0": "rotary 64",
    "--window 64,0 --softcap 5 --alibi --sink --scale 0.5 --chunk 32": "softcap 5",
    "--dropout 0.25": "dropout 0.25",
    "--backward": "backward bfloat16",
    "--backward --bias full --sink --lengths-q 5,6": "backward bfloat16 batch 2",
    "--backend reference": "seqlen 4096 x 4096",
}


class Tool(unittest.TestCase):
    def test_refuses_in_words(self) -> None:
        usable = ", ".join(b["name"] for b in json.loads(call("info --json").stdout)["backends"] if b["usable"])
        for words, said in REFUSED.items():
            said = said.replace("{usable}", usable)
            with self.subTest(words):
                done = call(words)
                self.assertEqual((done.returncode, done.stdout, done.stderr), (2, "", f"flash-attn{said}\n"))

    def test_help_describes_everything(self) -> None:
        for command in ("", *COMMANDS):
            done = call(f"{command} --help")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            # "  --name TYPE=default   Words", or the words on the next line where the name is long
            listed = re.findall(r"^  (\S.*?)(?:\s{2,}(\S.*))?$", re.sub(r"\n {20,}", "   ", done.stdout), re.M)
            self.assertTrue(listed)
            for name, words in listed:
                with self.subTest(f"{command} {name}"):
                    self.assertTrue(words)

    def test_explains(self) -> None:
        for words, problem in ASKED.items():
            with self.subTest(words):
                done = call(f"explain {words} --json")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                answer = json.loads(done.stdout)
                self.assertIn(problem, answer["problem"])
                self.assertEqual(answer["choice"], "reference" if "reference" in words else "cpu")
                self.assertTrue(answer["plan"])
                self.assertRegex(answer["work"], r"^([\d.]+ .?FLOP, [\d.]+ .?B: [\d.]+ .?FLOP a byte|0 FLOP, 0 B)$")

    def test_verify_is_short_unless_asked(self) -> None:
        short, long = call("verify --filter headdim"), call("verify --filter headdim --verbose")
        self.assertEqual((short.returncode, long.returncode), (0, 0))
        self.assertLess(len(short.stdout.splitlines()), 25)
        self.assertNotIn("of the bound\n", short.stdout)
        rows = [line for line in long.stdout.splitlines() if line.endswith("of the bound")]
        cases, within = re.search(r"^(\d+) of (\d+) within the bound, 0 refused", long.stdout, re.M).groups()
        self.assertEqual((str(len(rows)), cases), (within, within))
        # Each line of the summary: cases, of them within the bound.
        counts = re.findall(r"(?:for|back)ward +(\d+) +(\d+) +- +- ", short.stdout)
        self.assertEqual(sum(int(n) for n, _ in counts), int(cases))
        self.assertTrue(all(n == good for n, good in counts))

    def test_info_as_json(self) -> None:
        said = json.loads(call("info --json").stdout)
        self.assertIn(said["isa"], said["isas"])
        self.assertIn("cpu", [b["name"] for b in said["backends"] if b["usable"]])


if __name__ == "__main__":
    TOOL = sys.argv.pop(1)
    unittest.main()
