"""Parallel software text (en-de, en-fr) out of Debian's packages, for pretraining a small mBART.

    python examples/pretrain/corpora.py OUT_DIR

Needs Debian's ``apt-get`` and ``dpkg-deb`` (no root: apt works in a private directory) and ``polib``.  The text is of
three kinds, all of it translated by people:

* package descriptions: the Translation-en/-de/-fr indices, joined on Description-md5, paragraph by paragraph;
* gettext catalogues of desktop packages: msgid and msgstr;
* manuals (GNOME, KDE, GIMP, Debian): pages whose block elements follow each other alike in both languages.

Nothing of LibreOffice is taken, and every pair that shares a sentence with the LibreOffice help pages (the example's
fine-tuning data) is dropped.  OUT_DIR gets ``en-de.tsv.gz``, ``en-fr.tsv.gz``, ``dev.en-de.tsv.gz`` (held out) and
``corpora.json`` (packages, versions, licences and counts).  The packages are GPL for the most part: use, don't ship.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from html import unescape
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import polib

LANGUAGES = ("de", "fr")
DEV_PAIRS = 500
SEED = 17
MAX_WORDS = 200
MAX_RATIO = 2.5  # of characters, beyond RATIO_SLACK
RATIO_SLACK = 20
HELP_FILES = sorted((Path(__file__).parent.parent / "data").glob("libreoffice-help.*.tsv.gz"))

Pair = tuple[str, str]

# One source a line: packages that are read together (a manual's languages may be packages of their own).
SOURCES = """
gimp-help-en gimp-help-de gimp-help-fr
debian-handbook
debian-reference-en debian-reference-de debian-reference-fr
installation-guide-amd64
gnome-user-docs
gimp-data
inkscape
darktable
digikam-data
krita-l10n
hugin-data
libgphoto2-l10n
dia-common
shotwell-common
evolution-common
evolution-data-server-common
evolution-ews
gnome-control-center-data
gnome-shell-common
gnome-software-common
gnome-initial-setup
gnome-disk-utility
gnome-builder
gnome-settings-daemon-common
nautilus-data
gedit-common
epiphany-browser-data
totem-common
rhythmbox-data
brasero-common
cheese-common
file-roller
eog
evince-common
seahorse
simple-scan
deja-dup
aisleriot
devhelp-common
anjuta-common
glade
gtranslator
meld
libglib2.0-data
libgtk-3-common
libgtk2.0-common
libgtk-4-common
gnumeric-common
gnucash-common
gramps
gpodder
geany-common
bluefish-data
poedit-common
pidgin-data
hexchat-common
filezilla-common
claws-mail-i18n
sylpheed-i18n
audacity-data
ardour-data
denemo-data
solfege
tuxpaint tuxpaint-data
freeciv-data
wesnoth-1.16-data
vlc-l10n
synaptic
aptitude-common
apt
dpkg dpkg-dev
network-manager
network-manager-gnome
mate-control-center-common
caja-common
cinnamon-l10n
xfce4-settings
xfce4-panel
thunar-data
xkb-data
kate5-data
kdevelop-l10n
kdenlive-data
kmymoney-common
skrooge-common
okular
dolphin
konsole
konversation-data
ktorrent-data
kget
kpat
kmail
korganizer
kdepim-runtime
kdeconnect
kio
kwin-data
plasma-desktop-data
plasma-workspace-data
systemsettings
lokalize
rkward-data
labplot-data
cantor
kalzium-data
marble-data
step
tellico-data
calligra-data
libkf5i18n-data
libkf5xmlgui-data
coreutils
bash
tar
wget
grep
sed
findutils
diffutils
gettext
git
vim vim-runtime
subversion
binutils-common
gcc-12-locales
libc-l10n
gnupg-l10n
util-linux-locales
psmisc
grub-common
po4a
postgresql-15 postgresql-client-15
k3b-i18n
kile-l10n
e2fsprogs-l10n
debconf-i18n
kdevelop-php-l10n
kdevelop-python-l10n
umbrello-data
libvirt-l10n
sssd-common
nano
mc-data
mutt
systemd
flatpak
gnome-boxes
gnome-calendar
gnome-contacts
geary
atril-common
pluma-common
eom-common
engrampa-common
mate-user-guide
krusader
kphotoalbum
kmplot
konqueror
kio-extras-data
gwenview
ark
akregator
kaddressbook
kgpg
homebank-data
grisbi-common
xournalpp
exfalso
"""

BLOCKS = (
    {"h1", "h2", "h3", "h4", "h5", "h6", "p", "li", "dt", "dd", "td", "th"}  # HTML, Mallard
    | {"title", "subtitle", "para", "simpara", "term", "listitem", "entry", "desc", "item"}  # DocBook, Mallard
)
SKIPPED = {"pre", "screen", "programlisting", "script", "style", "synopsis", "literallayout", "credit", "info"}
LANGUAGE_PATHS = {  # what names the language in a manual's path: English, German, French
    "/help/C/": ("/help/de/", "/help/fr/"),
    "/en/": ("/de/", "/fr/"),
    "/en-US/": ("/de-DE/", "/fr-FR/"),
    ".en.html": (".de.html", ".fr.html"),
}
MARKUP = re.compile(
    r"</?(?:a|b|i|u|tt|big|small|span|p|br|em|strong|para|title|filename|application|command|emphasis|interface|icode|"
    r"placeholder|resource|message|note|warning|link|list|item|numid|ul|ol|li|html|body|center|nobr|code|h[1-6]|qt|"
    r"shortcut|table|tr|td|th|font|img|div|sub|sup|kbd|guimenu|guilabel|userinput)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
MARKUP_LEFT = re.compile(r"</|='|&[a-z]+;")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")


class Apt:
    """apt-get with its lists and cache in a private directory, and the description indices switched on."""

    def __init__(self, directory: Path) -> None:
        """Fetch the package lists into the directory."""
        self.lists = directory / "lists"
        for folder in (self.lists / "partial", directory / "cache" / "archives" / "partial"):
            folder.mkdir(parents=True)
        self.config = directory / "apt.conf"
        names = "".join(f'"{name}"; ' for name in ("en", *LANGUAGES))
        self.config.write_text(
            "#clear Acquire::Languages;\n"  # container images set it to "none"
            f"Acquire::Languages {{ {names}}};\n"
            f'Dir::State::lists "{self.lists}";\n'
            f'Dir::Cache "{directory}/cache";\n'
            'APT::Sandbox::User "";\n'
        )
        self.run("update", cwd=directory)

    def run(self, *arguments: str, cwd: Path) -> None:
        """Run apt-get quietly; a failure raises."""
        subprocess.run(["apt-get", "-qq", "-c", self.config, *arguments], cwd=cwd, check=True)

    def index(self, language: str) -> Iterator[dict[str, str]]:
        """The stanzas of the Translation indices of a language, as fields with their continuation lines."""
        for path in sorted(self.lists.glob(f"*Translation-{language}*")):
            command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for stanza in text.split("\n\n"):
                yield dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", stanza, re.MULTILINE))

    def extract(self, packages: list[str], tree: Path) -> dict[str, str]:
        """Download the packages and unpack them into one tree; returns their versions."""
        tree.mkdir()
        self.run("download", *packages, cwd=tree)
        versions = {}
        for deb in sorted(tree.glob("*.deb")):
            show = subprocess.run(["dpkg-deb", "-W", deb], check=True, capture_output=True, text=True).stdout
            subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
            deb.unlink()
            name, version = show.split()
            versions[name] = version
        return versions


def paragraphs(description: str) -> list[str]:
    """The summary, paragraphs and list items of a package description."""
    summary, _, body = description.partition("\n")
    parts = re.split(r"^ \.$|^ {1,3}[-*+o•](?= )", body, flags=re.MULTILINE)
    return [summary, *(part for part in parts if part.strip())]


def descriptions(apt: Apt, language: str) -> Iterator[Pair]:
    """Package descriptions, paragraph by paragraph, where both languages have equally many."""
    translated = {s["Description-md5"]: s[f"Description-{language}"] for s in apt.index(language) if s}
    for stanza in apt.index("en"):
        if not stanza or "libreoffice" in stanza["Package"] or stanza["Description-md5"] not in translated:
            continue
        source, target = map(paragraphs, (stanza["Description-en"], translated[stanza["Description-md5"]]))
        if len(source) == len(target):
            yield from zip(source, target, strict=True)


def catalogues(tree: Path, language: str) -> Iterator[Pair]:
    """msgid and msgstr of the tree's gettext catalogues; texts of several paragraphs are taken apart."""
    for path in sorted(tree.glob(f"usr/share/**/{language}/LC_MESSAGES/*.mo")):
        for entry in polib.mofile(path):
            forms = [(entry.msgid, entry.msgstr)]
            if entry.msgid_plural:
                forms = [(entry.msgid, entry.msgstr_plural[0]), (entry.msgid_plural, entry.msgstr_plural[1])]
            for source, target in forms:
                yield from split_alike(source, target)


def split_alike(source: str, target: str) -> Iterable[Pair]:
    """The paragraphs of both texts in pairs, or the texts whole where the counts differ."""
    sources, targets = (re.split(r"\n\s*\n", text.strip()) for text in (source, target))
    return zip(sources, targets, strict=True) if len(sources) == len(targets) else [(source, target)]


class Blocks(HTMLParser):
    """The block elements of an HTML, DocBook or Mallard page: (tag, text) in order, without code."""

    def __init__(self, page: str) -> None:
        """Read the page."""
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, str]] = []
        self.skipping = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block begins, or text to skip."""
        if tag in SKIPPED:
            self.skipping += 1
        elif tag in BLOCKS:
            self.found.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        """A block ends; what follows it belongs to none."""
        if tag in SKIPPED:
            self.skipping = max(0, self.skipping - 1)
        elif tag in BLOCKS:
            self.found.append(("", ""))

    def handle_data(self, data: str) -> None:
        """Text goes to the block that began last."""
        if self.found and not self.skipping:
            tag, text = self.found[-1]
            self.found[-1] = (tag, text + data)

    def handle_charref(self, name: str) -> None:
        """A character by number."""
        self.handle_data(unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        """A character by name; a manual's own entity (&kate;) stands for its name."""
        text = unescape(f"&{name};")
        self.handle_data(name if text.startswith("&") and len(text) > 1 else text)


def manuals(tree: Path, language: str) -> Iterator[Pair]:
    """The blocks of the tree's manual pages that have the same elements in English and in the language."""
    for pattern in LANGUAGE_PATHS:
        translated = LANGUAGE_PATHS[pattern][LANGUAGES.index(language)]
        for path in sorted(tree.glob("usr/share/**/*.*")):
            other = Path(str(path).replace(pattern, translated))
            if path.suffix in {".html", ".page", ".docbook", ".xml"} and other != path and other.is_file():
                source, target = (Blocks(p.read_text("utf-8", "replace")).found for p in (path, other))
                if [tag for tag, _ in source] == [tag for tag, _ in target]:
                    yield from ((s, t) for (tag, s), (_, t) in zip(source, target, strict=True) if tag)


def licences(tree: Path) -> list[str]:
    """The licence names in the packages' machine-readable copyright files."""
    files = tree.glob("usr/share/doc/*/copyright")
    names = chain.from_iterable(re.findall(r"^License: *(\S.*)", f.read_text("utf-8", "replace"), re.M) for f in files)
    return sorted({name.strip() for name in names})


def normalise(text: str) -> str:
    """Composed characters, single spaces, no markup and no invisible format characters."""
    plain = MARKUP.sub(" ", text)
    plain = unescape(plain) if plain != text or "&" in text else text
    visible = "".join(c for c in unicodedata.normalize("NFC", plain) if unicodedata.category(c) != "Cf")
    return " ".join(visible.split())


def without_mnemonics(source: str, target: str) -> Pair:
    """Both texts without the _ and & that mark access keys; words that both have in common are left as they are."""
    common = set(source.split()) & set(target.split())

    def strip(text: str) -> str:
        return " ".join(w if w in common else re.sub(r"[_&](?=\w)", "", w, count=1) for w in text.split())

    return strip(source), strip(target)


def sentences(text: str) -> set[str]:
    """The text and its sentences, in lower case, for comparing."""
    return {part.lower() for part in (text, *SENTENCE_END.split(text))}


def is_clean(source: str, target: str) -> bool:
    """Whether the pair looks like a translation of at least two words, with text in it and of like length."""
    shorter, longer = sorted((len(source), len(target)))
    both = f"{source} {target}"
    return (
        bool(target)
        and 2 <= len(source.split()) <= MAX_WORDS
        and len(target.split()) <= MAX_WORDS
        and longer <= MAX_RATIO * shorter + RATIO_SLACK
        and source.lower() != target.lower()
        and ("|" in source) == ("|" in target)
        and not MARKUP_LEFT.search(both)
        and sum(map(str.isalpha, both)) >= 0.6 * len(both.replace(" ", ""))
        and not any(unicodedata.category(c) in {"Cc", "Co", "Cs", "Cn"} or c == "\ufffd" for c in both)
    )


def clean(pairs: Iterable[Pair], excluded: set[str], seen: set[Pair]) -> Iterator[Pair]:
    """The clean pairs that were not seen before and share no sentence with the excluded ones."""
    for source, target in pairs:
        pair = without_mnemonics(normalise(source), normalise(target))
        if pair not in seen and is_clean(*pair) and excluded.isdisjoint(sentences(pair[0]) | sentences(pair[1])):
            seen.add(pair)
            yield pair


def help_sentences(files: Iterable[Path]) -> set[str]:
    """Every sentence of the LibreOffice help files (columns page, source, target), on either side."""
    found: set[str] = set()
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            next(lines)
            for line in lines:
                for text in line.rstrip("\n").split("\t")[1:]:
                    found |= sentences(normalise(text))
    return found


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write a TSV file with the header source, target; its bytes depend on the pairs alone."""
    text = "".join(f"{source}\t{target}\n" for source, target in chain([("source", "target")], pairs))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def count(pairs: list[Pair]) -> dict[str, int]:
    """Pairs, and words of either side."""
    words = {side: sum(len(pair[i].split()) for pair in pairs) for i, side in enumerate(("source", "target"))}
    return {"pairs": len(pairs), "source_words": words["source"], "target_words": words["target"]}


def without(held: list[Pair], pairs: list[Pair]) -> list[Pair]:
    """The pairs that share neither source nor target with the held-out ones, whatever the case of their letters."""
    sources, targets = ({pair[side].lower() for pair in held} for side in (0, 1))
    return [(s, t) for s, t in pairs if s.lower() not in sources and t.lower() not in targets]


def hold_out(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """A random sample of the pairs, and the others."""
    held = random.Random(SEED).sample(pairs, DEV_PAIRS)
    return held, without(held, pairs)


def collect(out: Path, excluded: set[str]) -> None:
    """Read every source, and write the pairs and their account."""
    corpora: dict[str, list[Pair]] = {language: [] for language in LANGUAGES}
    seen: dict[str, set[Pair]] = {language: set() for language in LANGUAGES}
    account: dict[str, dict[str, object]] = {}

    def add(name: str, found: Mapping[str, Iterable[Pair]], about: dict[str, object]) -> None:
        kept = {language: list(clean(pairs, excluded, seen[language])) for language, pairs in found.items()}
        for language, pairs in kept.items():
            corpora[language] += pairs
        account[name] = about | {f"en-{language}": count(pairs) for language, pairs in kept.items()}
        print(name, {language: len(pairs) for language, pairs in kept.items()}, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        apt = Apt(Path(directory) / "apt")
        about: dict[str, object] = {
            "packages": {},
            "licences": ["unstated (Debian's description translations)"],
        }
        add("package descriptions", {language: descriptions(apt, language) for language in LANGUAGES}, about)
        for line in SOURCES.split("\n")[1:-1]:
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                tree = Path(folder) / "tree"
                about = {"packages": apt.extract(line.split(), tree), "licences": licences(tree)}
                found = {name: chain(catalogues(tree, name), manuals(tree, name)) for name in LANGUAGES}
                add(line, found, about)

    dev, corpora["de"] = hold_out(corpora["de"])
    corpora["fr"] = without(dev, corpora["fr"])
    write_pairs(out / "dev.en-de.tsv.gz", dev)
    for language, pairs in corpora.items():
        write_pairs(out / f"en-{language}.tsv.gz", pairs)
    total = {"dev.en-de": count(dev)} | {f"en-{language}": count(pairs) for language, pairs in corpora.items()}
    (out / "corpora.json").write_text(json.dumps({"total": total, "sources": account}, indent=1, ensure_ascii=False))
    print(json.dumps(total, indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--exclude", type=Path, nargs="+", default=HELP_FILES, help="help pairs to keep out (.tsv.gz)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    collect(arguments.out, help_sentences(arguments.exclude))


if __name__ == "__main__":
    main()
