"""Pairs of texts: read from catalogues of installed packages or from a file, cleaned, split."""

import pytest
from examples_common import one_thread  # noqa: F401

# isort: split
import data
from data import DataError, Pair

CATALOGUE = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

msgid "Save the <b>file</b>"
msgstr "Guardar el <b>archivo</b>"

#. Default: "Log in to ${site}"
msgid "label_log_in"
msgstr "Entrar en ${site}"

msgid "heading_without_english"
msgstr "Título"

#, python-format
msgid "%(count)d file of %(user)s"
msgid_plural "%(count)d files of %(user)s"
msgstr[0] "un archivo de %(user)s"
msgstr[1] "%(user)s tiene %(count)d archivos"

#, fuzzy
msgid "Not sure"
msgstr "Quizás"

msgid "Untranslated"
msgstr ""

msgid "Radio"
msgstr "Radio"

#~ msgid "Gone"
#~ msgstr "Ido"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with Spanish as text and compiled, and French compiled only."""
    polib = pytest.importorskip("polib")
    root = tmp_path / "with_catalogues"
    folders = {code: root / "locale" / code / "LC_MESSAGES" for code in ("es", "fr_CA")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (root / "__init__.py").touch()
    (folders["es"] / "app.po").write_text(CATALOGUE, encoding="utf-8")
    polib.pofile(str(folders["es"] / "app.po")).save_as_mofile(str(folders["es"] / "app.mo"))
    compiled = polib.POFile(encoding="utf-8")
    compiled.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    compiled.append(polib.POEntry(msgid="Close", msgstr="Fermer"))
    compiled.save_as_mofile(str(folders["fr_CA"] / "app.mo"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_a_package_s_catalogues(package):
    assert data.catalogue_pairs(["with_catalogues"], "es") == [
        Pair("Save the file", "Guardar el archivo"),
        Pair("Log in to ⟨1⟩", "Entrar en ⟨1⟩"),
        Pair("⟨1⟩ files of ⟨2⟩", "⟨2⟩ tiene ⟨1⟩ archivos"),
        Pair("⟨1⟩ file of ⟨2⟩", "un archivo de ⟨2⟩"),
    ]
    for language in ("fr_CA", "fr-ca"):
        assert data.catalogue_pairs(["with_catalogues"], language) == [Pair("Close", "Fermer")]
    # each source once, however many packages have it
    once, twice = (data.catalogue_pairs(["with_catalogues"] * n, "es") for n in (1, 2))
    assert once == twice


def test_what_is_not_there(package):
    with pytest.raises(DataError, match="no translations to 'de', but to es, fr_CA"):
        data.catalogue_pairs(["with_catalogues"], "de")
    for name in ("no_such_package", "no_such.package", ""):
        with pytest.raises(DataError, match="not installed"):
            data.catalogue_pairs([name], "es")
    with pytest.raises(DataError, match="no translation catalogues"):
        data.catalogue_pairs(["email"], "es")
    (package / "locale" / "fr_CA" / "LC_MESSAGES" / "app.mo").write_bytes(b"not a catalogue")
    with pytest.raises(DataError, match="cannot read"):
        data.catalogue_pairs(["with_catalogues"], "fr_CA")


@pytest.mark.parametrize(
    "source, target, expected",
    [
        ("Fish &amp; chips", "Pescado  y\npatatas", ("Fish & chips", "Pescado y patatas")),
        ("%s by %s", "%s de %s", ("⟨1⟩ by ⟨2⟩", "⟨1⟩ de ⟨2⟩")),
        ("{b} or {a:>5}", "{a} o {b}", ("⟨1⟩ or ⟨2⟩", "⟨2⟩ o ⟨1⟩")),
        ("%(n).2f%% of %(n)s", "%(n).2f%% de %(n)s", ("⟨1⟩% of ⟨1⟩", "⟨1⟩% de ⟨1⟩")),
        ("100% sure", "100% seguro", ("100% sure", "100% seguro")),
        ('<a href="{url}">Go</a> on', "Seguir", ("Go on", "Seguir")),
        ("See ${a}", "Ver ${b}", None),  # a placeholder that the source has not
        ("%s: ${d}", "%s; ${d}", None),  # no words
        ("help.some_text", "Ayuda", None),  # a key
        ("OK", "OK", None),  # no translation
        ("<br/>Yes", " ", None),
    ],
)
def test_messages_are_cleaned(source, target, expected):
    assert data.clean_message(source, target) == (expected and Pair(*expected))


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("one\t uno  y \n\ntwo\tdos\none\tuno y\nthree\t\n", encoding="utf-8")
    assert data.read_pairs(path) == [Pair("one", "uno y"), Pair("two", "dos")]
    for text, message in (
        (b"one\tuno\ttres\n", "line 1: .* got 2 tabs"),
        (b"", "has no pairs"),
        (b"\xff\xfe\t\n", "utf-8"),
    ):
        path.write_bytes(text)
        with pytest.raises(DataError, match=message):
            data.read_pairs(path)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="--data"):
            data.read_pairs(missing)


def test_no_source_is_on_both_sides():
    pairs = [
        Pair(source, f"{source}{i}")
        for i in range(100)
        for source in (f"Save file {i}.", f"save FILE: {i}", f"Save file {i}", f"Open {i}")
    ]
    training, held_out = data.split_pairs(pairs, 0.2, seed=1)
    known = {data.normalised(pair.source) for pair in training}
    asked = [data.normalised(pair.source) for pair in held_out]
    assert len(held_out) == 40 and len(training) + len(held_out) > 300
    assert len(set(asked)) == len(asked) and not known & set(asked)
    assert data.split_pairs(pairs, 0.2, seed=1) == (training, held_out)
    assert data.split_pairs(pairs, 0.2, seed=2) != (training, held_out)
    assert data.normalised("¿?") != data.normalised("!")  # texts without words stay apart


@pytest.mark.parametrize("package, least", [("django", 700), ("plone.app.locales", 3000)])
def test_the_default_packages(package, least):
    pytest.importorskip("polib")
    pytest.importorskip(package)
    pairs = data.catalogue_pairs([package], "es")
    assert len(pairs) >= least
    assert len({pair.source for pair in pairs}) == len(pairs)
    for source, target in pairs:
        assert source == data.clean(source) and target == data.clean(target)
        assert source and target and source != target
        assert "%(" not in source + target and "${" not in source + target
