"""What the examples learn from: text that is on every machine, split, in tokens, in batches."""

from __future__ import annotations

import ast
import functools
import hashlib
import html
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class DataError(ValueError):
    """The data or the checkpoint cannot be used; the message says why, and what would help."""


# ----------------------------------------------------------------------------- text and tokens


def standard_library() -> tuple[Path, list[Path]]:
    """Where the sources of Python's standard library are, and which files they are."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    return root, [f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts)]


def read_text(path: Path | None, limit: int) -> bytes:
    """Up to `limit` bytes of a file, of the text files in a folder, or, for None, of the Python
    standard library's own source. The same bytes every time: files are sorted, then shuffled with
    a fixed seed, so that a limited amount is not all of one package.
    """
    if path is None:
        root, files = standard_library()
        what = f"the Python standard library ({root})"
    elif path.is_dir():
        root, what = path, f"the folder {path}"
        hidden = [f for f in root.rglob("*") if f.is_file()]
        files = [f for f in hidden if not any(p[0] == "." for p in f.relative_to(root).parts)]
    elif path.is_file():
        root, files, what = path.parent, [path], f"the file {path}"
    else:
        raise DataError(f"--data {path}: there is no such file or folder")
    files.sort(key=lambda f: f.relative_to(root).as_posix())
    random.Random(0).shuffle(files)
    pieces, size = [], 0
    for file in files:
        piece = read_file(file)
        if b"\0" in piece:  # not text
            continue
        pieces.append(piece)
        size += len(piece)
        if size >= limit:
            break
    text = b"\n".join(pieces)[:limit]
    if not text.strip():
        raise DataError(f"{what} has no text in it")
    return text


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


class Docstring(NamedTuple):
    """What a module of the standard library says of itself or of a class or function in it."""

    package: str  # "asyncio", "email", "tkinter", ...: its topic
    signature: str  # what it documents, in words: "json encoder iter encode (o, one shot)"
    summary: str  # the first line
    body: str  # the other lines, cleaned; may be empty


def docstrings() -> list[Docstring]:
    """The docstrings of the standard library, in a fixed order, without repetitions."""
    root, files = standard_library()
    found: dict[str, Docstring] = {}
    for file in sorted(files):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates, and what cannot be read
            continue
        package = file.relative_to(root).parts[0].removesuffix(".py")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        owner = {tree: file.stem}  # of each node, the class or else the module that it is in
        for node in ast.walk(tree):
            inner = node.name if isinstance(node, ast.ClassDef) else owner[node]
            owner.update(dict.fromkeys(ast.iter_child_nodes(node), inner))
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and text.strip():
                summary, _, body = inspect.cleandoc(text).strip().partition("\n")
                what = signature(node, owner[node])
                found.setdefault(text, Docstring(package, what, clean(summary), clean(body)))
    return list(found.values())


def signature(node: ast.AST, owner: str) -> str:
    """A module, class or function in words, with the owner and the arguments it has, if any."""
    name = getattr(node, "name", "")
    arguments = ""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        arguments = f"({', '.join(words(a) for a in names if a not in ('self', 'cls'))})"
    return " ".join(filter(None, (words(owner), words(name), arguments)))


def words(name: str) -> str:
    """JSONEncoder_v2 -> json encoder v 2"""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()


class Passage(NamedTuple):
    """A text of a few sentences, and what it is about."""

    topic: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


PASSAGES_HELP = (
    "your own texts, in place of the standard library's docstrings: a text file or a folder of "
    "them; texts are divided by blank lines, and their topic is the folder below PATH that the "
    "file is in, or the file's name"
)


@functools.cache  # parsing the standard library takes seconds
def passages(path: Path | None) -> tuple[Passage, ...]:
    """The docstrings of the standard library, their topic the package, or the paragraphs of a text
    file or a folder of them, their topic the folder below `path` or else the file's name. In a
    fixed order, without repetitions.
    """
    if path is None:
        return tuple(
            Passage(d.package, (*sentences(d.summary), *sentences(d.body))) for d in docstrings()
        )
    if not path.exists():
        raise DataError(f"--data {path}: there is no such file or folder")
    root = path if path.is_dir() else path.parent
    found: dict[str, Passage] = {}
    for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
        place = file.relative_to(root)
        content = read_file(file)
        if b"\0" in content or any(part.startswith(".") for part in place.parts):
            continue
        topic = place.parts[0] if len(place.parts) > 1 else place.stem
        for paragraph in re.split(r"\n\s*\n", content.decode("utf-8", errors="replace")):
            if text := clean(paragraph):
                found.setdefault(text, Passage(topic, tuple(sentences(text))))
    if not found:
        raise DataError(f"--data {path} has no text in it")
    return tuple(found.values())


def sentences(text: str) -> list[str]:
    """A text cut after each full stop, question or exclamation mark that a new sentence follows."""
    return re.split(r"(?<=[.!?])\s+(?=[^a-z\s])", text) if text else []


def split_passages(path: Path | None, fewest: int) -> tuple[list[Passage], list[Passage]]:
    """(training, held-out): every script sees the same eighth held out, so that what one of them
    learns from, another can be asked about. DataError for fewer than `fewest` passages.
    """
    every = passages(path)
    if len(every) < fewest:
        raise DataError(
            f"the text has {len(every)} passages (docstrings, or paragraphs between blank lines), "
            f"at least {fewest} are needed"
        )
    return split(every, held_out=1 / 8)


def clean(text: str) -> str:
    """Any run of white space becomes one space; control characters go."""
    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    return re.sub(r"\s+", " ", printable).strip()


Item = TypeVar("Item")


def split(items: Sequence[Item], held_out: float, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """(training, held-out) in a random order that depends on the seed alone."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    cut = len(items) - round(len(items) * held_out)
    return [items[i] for i in order[:cut]], [items[i] for i in order[cut:]]


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256

    def to_json(self) -> str:
        return ""

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as GPT-2's."""

    PIECE = 1 << 16  # characters encoded at a time: one long string would take one core only

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def train(
        cls, text: bytes, vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> BPETokenizer:
        """Special tokens ("[PAD]", "[MASK]", ...) get the first ids; text never encodes to them.
        DataError where `vocab_size` is less than the bytes and these.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise DataError(f"--vocab {vocab_size}: at least {least}, every byte and special token")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(special_tokens),
            show_progress=False,
        )
        tokenizer.train_from_iterator(cls.pieces(text), trainer)
        tokenizer.encode_special_tokens = True  # as any other text
        return cls(tokenizer)

    def to_json(self) -> str:
        """As the tokenizers library writes it, and a checkpoint keeps it."""
        return self.tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> BPETokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = True  # as any other text; the JSON does not say it
        return cls(tokenizer)

    @classmethod
    def pieces(cls, text: bytes) -> list[str]:
        string = text.decode("utf-8", errors="replace")
        return [string[i : i + cls.PIECE] for i in range(0, len(string), cls.PIECE)]

    def encode(self, text: bytes) -> Tensor:
        ids: list[int] = []
        for encoding in self.tokenizer.encode_batch(self.pieces(text)):
            ids += encoding.ids
        return torch.tensor(ids)

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens.tolist())


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of a step's batch. It depends on the seed and the step alone, so a run that is
    resumed at a step finds its place in the data with no state to save.
    """
    key = hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))


def fingerprint(*tokens: Tensor) -> str:
    """Tells data from other data."""
    digest = hashlib.sha256()
    for tensor in tokens:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (len(rows), longest): rows of unequal length filled up with `value` on
    the right, or on the left; the mask is True where there is a real token.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        tokens[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return tokens, mask


def random_rows(count: int, seed: int, step: int, batch: int) -> list[int]:
    """The indices of a step's examples: `batch` of `count`, each once an epoch."""
    epoch_steps = max(1, count // batch)
    epoch, place = divmod(step, epoch_steps)
    order = torch.randperm(count, generator=step_generator(seed, -1 - epoch)).tolist()
    return [order[i % count] for i in range(place * batch, (place + 1) * batch)]


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both (len(starts), context): the targets are the inputs one token on."""
    rows = tokens[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_windows(
    tokens: Tensor, seed: int, step: int, batch: int, context: int
) -> tuple[Tensor, Tensor]:
    """`batch` windows from anywhere in the tokens, as the step's generator draws them."""
    starts = torch.randint(len(tokens) - context, (batch,), generator=step_generator(seed, step))
    return windows(tokens, starts, context)


def even_windows(tokens: Tensor, most: int, context: int) -> tuple[Tensor, Tensor]:
    """Up to `most` windows, evenly spaced and not overlapping."""
    count = min(most, (len(tokens) - 1) // context)
    starts = torch.arange(count) * ((len(tokens) - 1) // count)
    return windows(tokens, starts, context)


# ------------------------------------------------------------------------------ pairs of texts


class Pair(NamedTuple):
    """What an encoder-decoder learns from: a text, and what is to become of it."""

    source: str
    target: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a text file, one a line: source, tab, target. White space is cleaned, what is
    empty on either side or was there before is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"--data {path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"--data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--data {path} is no UTF-8 text: {error}") from error
    found: dict[Pair, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.count("\t") != 1:
            raise DataError(
                f"{path}, line {number}: expected a source, a tab and a target, "
                f"got {line.count(chr(9))} tabs"
            )
        pair = Pair(*map(clean, line.split("\t")))
        if pair.source and pair.target:
            found[pair] = None
    if not found:
        raise DataError(f"--data {path} has no pairs in it")
    return list(found)


def split_pairs(
    pairs: Sequence[Pair], held_out: float, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs: no source is on both sides, be it in another case or with other
    punctuation, and none is held out twice.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(normalised(pair.source), []).append(pair)
    training, kept = split(list(groups.values()), held_out, seed)
    return [pair for group in training for pair in group], [group[0] for group in kept]


def normalised(text: str) -> str:
    """The words of a text, in lower case; of one without words, the text."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def catalogue_pairs(packages: Sequence[str], language: str) -> list[Pair]:
    """English messages and their translation to a language ("de", "pt_BR"), as the gettext
    catalogues of installed packages (by import name) have them, cleaned, each source once.

    DataError where a package is not installed, has no catalogues, or has none of the language.
    """
    found: dict[str, str] = {}
    for package in packages:
        catalogues = find_catalogues(package)
        by_name = {name.lower(): files for name, files in catalogues.items()}
        files = by_name.get(language.lower().replace("-", "_"))
        if files is None:
            raise DataError(
                f"{package} has no translations to {language!r}, but to {', '.join(catalogues)}"
            )
        for file in files:
            for source, target in catalogue_messages(file):
                pair = clean_message(source, target)
                if pair is not None:
                    found.setdefault(pair.source, pair.target)
    return [Pair(*item) for item in found.items()]


def find_catalogues(package: str) -> dict[str, list[Path]]:
    """language -> the catalogues of an installed package; of one that is there both as text (.po)
    and compiled (.mo), the text, which alone has the comments.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # a package that it would be in is not there, or no name
        spec = None
    if spec is None:
        raise DataError(f"--package {package}: not installed; try `pip install {package}`")
    found: dict[str, dict[Path, Path]] = {}
    for root in map(Path, spec.submodule_search_locations or ()):
        for ending in ("mo", "po"):
            for file in sorted(root.rglob(f"*/LC_MESSAGES/*.{ending}")):
                found.setdefault(file.parent.parent.name, {})[file.with_suffix("")] = file
    if not found:
        raise DataError(
            f"--package {package} has no translation catalogues (LC_MESSAGES/*.po, .mo)"
        )
    return {language: list(found[language].values()) for language in sorted(found)}


def catalogue_messages(file: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of what is translated in a catalogue, as it is written there.

    Where the message id is a key ("label_save"), its English is in the comment `Default: "Save"`.
    Of plural forms, the first goes with the English singular and the last with the plural.
    """
    import polib

    read = polib.pofile if file.suffix == ".po" else polib.mofile
    try:
        entries = read(str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    for entry in entries:
        # a compiled catalogue has no comments and nothing that its author calls fuzzy
        comment, fuzzy = getattr(entry, "comment", ""), getattr(entry, "fuzzy", False)
        default = re.search(r'Default:\s*"(.*)"', comment, re.DOTALL)
        if entry.obsolete or fuzzy:
            continue
        if entry.msgid_plural:
            forms = [entry.msgstr_plural[i] for i in sorted(entry.msgstr_plural)]
            yield entry.msgid_plural, forms[-1]
            if len(forms) > 1:
                yield entry.msgid, forms[0]
        else:
            yield default.group(1) if default else entry.msgid, entry.msgstr


PLACEHOLDER = re.compile(
    r"%\((?P<percent>\w+)\)[-#0+ ]*[\d.]*[a-zA-Z]"  # %(name)s
    r"|\$\{(?P<dollar>[\w.]+)\}"  # ${name}
    r"|\{(?P<brace>\w*)[^{}]*\}"  # {name}, {0:>5}
    r"|%[-#0+]*[\d.]*[sdirfgx](?!\w)"  # %s, %5.2f
)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
KEY = re.compile(r"[a-z0-9]+([_.:-][a-z0-9]+)+", re.IGNORECASE)


def clean_message(source: str, target: str) -> Pair | None:
    """The pair without markup and with placeholders numbered, so that what programmers called them
    need not be learned: "%(user)s has %(n)d" -> "⟨1⟩ has ⟨2⟩". None where nothing can be learned:
    no words, a key that nothing says the English of, no translation, or one whose placeholders are
    not the source's.
    """
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        name = match["percent"] or match["dollar"] or match["brace"]
        if not name:  # placeholders without a name are told by their order
            unnamed.append(match[0])
            name = f"%{len(unnamed)}"
        return f"⟨{numbers.setdefault(name, len(numbers) + 1)}⟩"

    texts = []
    for text in (source, target):
        unnamed: list[str] = []
        text = clean(TAG.sub(" ", html.unescape(text)))
        texts.append(PLACEHOLDER.sub(number, text).replace("%%", "%"))
        if len(texts) == 1:
            of_source = len(numbers)
            wordless = not re.search(r"[^\W\d_]", PLACEHOLDER.sub("", text))
    pair = Pair(*texts)
    if wordless or len(numbers) > of_source or KEY.fullmatch(pair.source):
        return None
    return pair if pair.target and pair.source != pair.target else None
