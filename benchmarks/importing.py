"""`python -m benchmarks.importing [ROWS]`: how long `chatd import` takes for a CSV file, on SQLite.

A thousand rooms, five thousand users, texts of 20 to 200 characters, in a directory that goes away afterwards.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

ROOMS, USERS = 1000, 5000
COLUMNS = ("id", "chat_conversation_id", "user_id", "type", "content", "meta", "created_at", "updated_at")
WORDS = ("a", "backend", "posts", "message", "and", "everybody", "in", "the", "room", "has", "it", "at", "once")


def write(path: Path, rows: int) -> None:
    chance = random.Random(1)
    began = datetime(2020, 1, 1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for id in range(1, rows + 1):
            room = chance.randint(1, ROOMS)
            author = (room * 7 + chance.randint(0, 19)) % USERS + 1  # twenty people write in a room
            text = " ".join(chance.choices(WORDS, k=chance.randint(4, 40)))
            meta = '{"device": "phone"}' if id % 10 == 0 else ""
            moment = began + timedelta(seconds=id * 60)
            writer.writerow([id, room, author, "text", text, meta, moment, moment])


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        file, database = Path(directory) / "old.csv", Path(directory) / "chatd.db"
        write(file, rows)
        print(f"{rows:,} rows, {file.stat().st_size / 2**20:,.0f} MiB of CSV")
        environ = os.environ | {"CHATD_DATABASE__URL": f"sqlite:///{database}"}
        for arguments in (["migrate"], ["import", "--dry-run", file], ["import", file], ["import", file]):
            subprocess.run([sys.executable, "-m", "chatd", *map(str, arguments)], env=environ, cwd=directory)
        print(f"{database.stat().st_size / 2**20:,.0f} MiB of SQLite")


if __name__ == "__main__":
    main()
