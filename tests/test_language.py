"""Hold docstrings, comments, messages and pages to plain English.

The rules are those that a machine can check:

- A docstring of a function begins with a verb: "Return the state.", not "The state." Classes, modules, properties and
  attributes may begin with a noun, but none with What, Whether, Of or How.
- "is not a", never "is no" ("there is no" is fine); users are "they"; terms of the field, not of the authors.
- Pages have no line over 120 characters, tables and code aside.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import recsys_ssm
from recsys_ssm.paths import CONF_DIR

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(recsys_ssm.__file__).parent
WIDTH = 120

# Patterns of files that are still being rewritten; remove a line when its files pass.
NOT_YET: tuple[str, ...] = ()

# First words of a function's docstring that are not verbs, and endings of words that are not.
NOT_A_VERB = re.compile(
    r"(?:A|About|Above|After|All|Also|An|And|Another|Any|Are|As|At|Because|Before|Beside|Besides|Between|Both|"
    r"But|By|Each|Either|Every|Few|First|For|From|Given|He|Here|How|However|If|In|Inside|Instead|Into|Is|It|"
    r"Its|Just|Last|Like|Many|More|Most|Neither|No|None|Not|Nothing|Of|On|Once|One|Only|Other|Our|Out|Outside|"
    r"Over|Per|Same|She|Since|So|Some|Such|Than|That|The|Their|Then|There|These|They|This|Those|Three|To|Too|"
    r"Two|Under|Unless|Until|Up|Upon|Was|We|What|When|Where|Whether|Which|While|Who|Whole|Whom|Whose|Why|With|"
    r"Within|Without|You|Your)"
    r"|\w+(?:[^s]s|ed|ing)"
)
# Verbs that the endings above would exclude.
VERBS = frozenset({"Bring", "Embed", "Exceed", "Feed", "Need", "Proceed", "Seed", "Shed", "Speed"})
NEVER_FIRST = re.compile(r"(?:What|Whether|Of|How)\b|[a-z(`]")
BANNED = {
    r"(?<!there )\b(?:is|are) no\b(?! longer)": 'write "is not a"',
    r"\b(?:he|him|his|himself|she|her|hers|herself)\b": 'write "they"',
    r"\bdoors?\b": 'write "command"',
    r"\bstand-ins?\b": 'write "generated data"',
    r"\b(?:told|said)\b": 'write "logged", "printed" or "given"',
}


def name_of(path: Path) -> str:
    """Return a file's path as messages show it."""
    for root, prefix in ((PACKAGE, "recsys_ssm/"), (CONF_DIR, "conf/"), (ROOT, "")):
        if path.is_relative_to(root):
            return prefix + path.relative_to(root).as_posix()
    return path.as_posix()


def files() -> list[Path]:
    """Return the package, its configs and, in a checkout, the pages, benchmarks and scripts."""
    found = [*PACKAGE.rglob("*.py"), *CONF_DIR.rglob("*.yaml"), *ROOT.glob("*.md")]
    found += (ROOT / "docs").rglob("*.md")
    for folder in ("benchmarks", "scripts", "examples"):
        found += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]
    return sorted(set(found))


def banned(text: str, line: int) -> Iterator[tuple[int, str]]:
    flat = " ".join(text.split())
    for pattern, advice in BANNED.items():
        for match in re.finditer(pattern, flat, flags=re.IGNORECASE):
            around = flat[max(0, match.start() - 30) : match.end() + 30]
            yield line, f"…{around}…: {advice}"


def first_word(text: str) -> str:
    return re.split(r"[\s.,:;]", text.strip(), maxsplit=1)[0]


def is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("property" in ast.unparse(each) for each in decorators)


def check_docstring(text: str, line: int, node: ast.AST) -> Iterator[tuple[int, str]]:
    start = text.strip().split("\n")[0][:50]
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    is_attribute = isinstance(node, ast.Expr)
    word = first_word(text)
    if re.match(r"(?:What|Whether|Of|How)\b", start) or (
        not is_attribute and NEVER_FIRST.match(start)
    ):
        yield line, f"docstring {start!r}: begin with a verb or a noun"
    elif is_function and not is_property(node) and NOT_A_VERB.fullmatch(word) and word not in VERBS:
        yield line, f"docstring {start!r}: begin with a verb, as in a command"


def check_python(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for i, statement in enumerate(body):
            if not (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                continue
            docstrings.add(statement.value)
            owner = statement if i or isinstance(node, ast.If) else node
            yield from check_docstring(statement.value.value, statement.lineno, owner)
            yield from banned(statement.value.value, statement.lineno)

    in_f_strings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            in_f_strings.update(parts)
            yield from banned("x".join(str(part.value) for part in parts), node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_text = len(node.value.split()) >= 3
            if is_text and node not in docstrings and node not in in_f_strings:
                yield from banned(node.value, node.lineno)

    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from check_comments(
        [(t.start[0], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT]
    )


def check_yaml(source: str) -> Iterator[tuple[int, str]]:
    found = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), 1)
        if (match := re.search(r"(?:^|\s)#\s*(.*)", line))
    ]
    yield from check_comments(found)


def check_comments(comments: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Check comments; those on consecutive lines are one text."""
    block: list[str] = []
    for i, (line, text) in enumerate(comments):
        block.append(text)
        if i + 1 == len(comments) or comments[i + 1][0] != line + 1:
            yield from banned(" ".join(block), line - len(block) + 1)
            block = []


def check_markdown(source: str) -> Iterator[tuple[int, str]]:
    in_code = False
    prose: list[tuple[int, str]] = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            prose.append((number, line))
            is_table, is_link = line.lstrip().startswith("|"), " " not in line.strip()
            if len(line) > WIDTH and not is_table and not is_link:
                yield number, f"{len(line)} characters; write at most {WIDTH}"
    yield from check_comments([(number, line) for number, line in prose if line.strip()])


CHECKS = {".py": check_python, ".yaml": check_yaml, ".md": check_markdown}


def cases() -> list[object]:
    made = []
    for path in files():
        name = name_of(path)
        waits = any(re.fullmatch(pattern, name) for pattern in NOT_YET)
        marks = [pytest.mark.xfail(reason="being rewritten", strict=False)] if waits else []
        made.append(pytest.param(path, id=name, marks=marks))
    return made


@pytest.mark.parametrize("path", cases())
def test_language(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    problems = [f"{name_of(path)}:{line}: {what}" for line, what in CHECKS[path.suffix](source)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("suffix", "source", "advice"),
    [
        (".py", 'def f():\n    """What it is."""', "begin with a verb"),
        (".py", 'def f():\n    """The state."""', "begin with a verb"),
        (".py", 'def f():\n    """Returns it."""', "begin with a verb"),
        (".py", 'def f():\n    """(B, L), the mask."""', "begin with a verb"),
        (".py", 'class A:\n    """Of a run."""', "begin with a verb"),
        (".py", 'x = 1\n"""Whether it is so."""', "begin with a verb"),
        (".py", 'raise ValueError(f"{x} is no multiple of {y}")', 'write "is not a"'),
        (".py", "# A user's choice is\n# his own.", 'write "they"'),
        (".yaml", "a: 1  # the door's\n", 'write "command"'),
        (".md", "As the\nlog has told us.\n", 'write "logged"'),
        (".md", "word " * 30, "characters; write at most"),
    ],
)
def test_the_checks_find(suffix: str, source: str, advice: str) -> None:
    assert advice in "\n".join(what for _, what in CHECKS[suffix](source))


@pytest.mark.parametrize(
    ("suffix", "source"),
    [
        (".py", 'def f():\n    """Return it; there is no such file."""'),
        (".py", 'class A:\n    """Mask of a row."""\n    b: int\n    """(B, L)."""'),
        (".py", '@property\ndef f(self):\n    """Bytes a second."""'),
        (".py", 'def f():\n    """Process, embed and pass it."""'),
        (".md", "| " + "word " * 30 + "|\n```\n" + "his " * 40 + "\n```\n"),
    ],
)
def test_the_checks_pass(suffix: str, source: str) -> None:
    assert not list(CHECKS[suffix](source))
