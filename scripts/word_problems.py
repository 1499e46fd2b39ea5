"""Write generated word problems as JSONL, for training and held out:  python word_problems.py FOLDER TRAIN TEST [SEED]"""

import json
import sys
from pathlib import Path

from cllm.files import write_text
from cllm.tasks.arithmetic import generate


def main(folder: str, train: str, test: str, seed: str = "0") -> None:
    learned = generate(int(train), int(seed))
    held_out = generate(int(test), int(seed) + 1, exclude={row["question"] for row in learned})
    for name, rows in (("train", learned), ("test", held_out)):
        write_text(Path(folder) / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
