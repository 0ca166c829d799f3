"""Definitions with one thing wrong or odd, made from good ones by chance: the same seed gives the same one again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Document = dict[str, Any]
#: From the root to a value.
Place = tuple[str | int, ...]

GOOD: tuple[Document, ...] = (
    {
        "name": "digits",
        "description": "Trains.",
        "parameters": {
            "seed": {"type": "int", "default": 7, "min": 0},
            "kind": {"type": "str", "default": "svm", "choices": ["svm", "tree"]},
        },
        "steps": {
            "load": {"uses": "json:dumps", "with": {"obj": "${{ params.seed }}"}, "timeout_s": 60},
            "train": {
                "uses": "json:dumps",
                "foreach": "${{ steps.load.output.parts }}",
                "with": {"obj": {"part": "${{ item }}", "kind": ["${{ params.kind }}"]}},
                "retry": {"max_attempts": 3, "initial_s": 0.5, "on": ["ConnectionError"]},
                "resources": {"cpus": 2, "memory_mb": 512, "custom": {"edge": 1}},
                "max_parallel": 4,
            },
            "gate": {"approval": {"message": "ship it?", "approvers": ["ann"]}, "needs": ["train"]},
            "report": {"command": ["echo", "${{ steps.train.output }}"], "needs": ["gate"], "cache": {"ttl_s": 60}},
        },
        "finally": {"tell": {"command": "echo ${{ run.state }}", "when": "${{ run.state == 'FAILED' }}"}},
        "outputs": {"parts": "${{ steps.load.output }}"},
        "timeout_s": 3600,
        "priority": 3,
    },
    {
        "name": "outer",
        "parameters": {"n": {"type": "int"}, "rate": {"type": "float", "default": 0.5, "max": 1}},
        "steps": {
            "inner": {
                "pipeline": {
                    "name": "inner",
                    "parameters": {"n": {"type": "int"}},
                    "steps": {"work": {"uses": "json:dumps", "with": {"obj": "${{ params.n }}"}}},
                },
                "with": {"n": "${{ params.n }}"},
            },
            "after": {"uses": "json:dumps", "with": {"obj": 1}, "needs": ["inner"], "durable": True},
        },
        "concurrency": {"key": "${{ params.n }}", "limit": 2, "when_full": "queue"},
        "env": {"variables": {"A": "b"}},
    },
    {"name": "p", "steps": {"only": {"uses": "json:dumps", "with": {"obj": None}}}},
)

#: What may stand anywhere, and belongs nowhere.
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**18, 1e308, -0.5, "", " ", "x", "a\nb", "a\u2028b", "\x7f", "ｓｔｅｐｓ", "x" * 5_000, [], {},
    [[]],
    [None], {"": 1}, {"a\nb": {"c": []}}, {"uses": "m:f"}, "${{", "}}", "${{ }}", "${{ params }}", "${{ @ }}",
    "${{ a..b }}",
    "${{ steps.nobody.output }}", "${{ item }}", "${{ run.state }}", "${{ `1` }}", "${{ __class__ }}", "${{" * 50,
    "${{ " + "(" * 500 + " }}", ["${{ params.none }}"] * 200,
)  # fmt: skip
#: Letters that look like others.
_LOOK_ALIKE = {"a": "а", "e": "е", "o": "о", "p": "р", "c": "с", "s": "ѕ", "i": "і", "n": "ո", "u": "υ", "t": "т"}

#: Makes one thing wrong for certain. None where the document has no place for that.
Wrong = Callable[[Document, random.Random], Document | None]


def mutated(seed: int) -> tuple[Document, str, bool]:
    """A definition, what was done to it, and whether that must be refused."""
    chance = random.Random(seed)
    document = copy.deepcopy(chance.choice(GOOD))
    if chance.random() < 0.5:
        wrong = chance.choice(WRONG)
        made = wrong(document, chance)
        if made is not None:
            return made, f"{seed}: {wrong.__name__.strip('_')}", True
    done = [_disturb(document, chance) for _ in range(chance.randint(1, 3))]
    return document, f"{seed}: {'; '.join(done)}", False


def places(value: object, place: Place = ()) -> Iterator[Place]:
    """Every place below the root."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*place, key)
        yield from places(inner, (*place, key))


def _disturb(document: Document, chance: random.Random) -> str:
    """Does something odd somewhere."""
    found = list(places(document))
    if not found:
        return "nothing"
    place = chance.choice(found)
    holder = _at(document, place[:-1])
    key = place[-1]
    what = chance.choice(("replace", "remove", "rename", "move", "wrap"))
    if what == "replace":
        holder[key] = copy.deepcopy(chance.choice(ODD))
    elif what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[str(chance.choice([*_names(found), "a\nb", "x" * 300, "", "ѕteps", " "]))] = holder.pop(key)
    elif what == "move":
        holder[key] = copy.deepcopy(_at(document, chance.choice(found)))
    else:
        holder[key] = chance.choice(([holder[key]], {"x": holder[key]}))
    return f"{what} {place!r:.200}"


def _names(found: list[Place]) -> list[str]:
    return [str(place[-1]) for place in found]


def _at(document: Document, place: Place) -> Any:
    value: Any = document
    for part in place:
        value = value[part]
    return value


# -- certainly wrong -------------------------------------------------------------------------------


def _step(document: Document, chance: random.Random) -> dict[str, Any]:
    step: dict[str, Any] = chance.choice(list(document["steps"].values()))
    return step


def _unknown_field(document: Document, chance: random.Random) -> Document:
    chance.choice((document, _step(document, chance)))[chance.choice(("version", "need", "Uses", "a\nb", ""))] = 1
    return document


def _look_alike_field(document: Document, chance: random.Random) -> Document:
    holder = chance.choice((document, _step(document, chance)))
    key = chance.choice([key for key in holder if _LOOK_ALIKE.keys() & set(key)])
    letter = chance.choice([letter for letter in key if letter in _LOOK_ALIKE])
    holder[key.replace(letter, _LOOK_ALIKE[letter], 1)] = holder.pop(key)
    return document


def _odd_step_name(document: Document, chance: random.Random) -> Document:
    name = chance.choice(
        ("", " ", "1st", "a-b", "a.b", "a\nb", "stеp", "ｓｔｅｐ", "a" * 64, "../a", "a/b", "$a", "a\u200b")
    )
    document["steps"][name] = {"uses": "json:dumps"}
    return document


def _no_kind(document: Document, _chance: random.Random) -> Document:
    document["steps"]["odd"] = {"description": "does nothing"}
    return document


def _two_kinds(document: Document, _chance: random.Random) -> Document:
    document["steps"]["odd"] = {"uses": "json:dumps", "command": "true"}
    return document


def _unknown_need(document: Document, chance: random.Random) -> Document:
    _step(document, chance)["needs"] = [chance.choice(("nobody", "loаd", "LOAD"))]
    return document


def _unknown_reference(document: Document, chance: random.Random) -> Document:
    read = chance.choice(
        ("steps.nobody.output", "params.nobody", "secrets.key", "steps", "item.item", "run.secret", "@")
    )
    document["steps"]["odd"] = {"uses": "json:dumps", "with": {"obj": [{"x": f"a ${{{{ {read} }}}}"}]}}
    return document


def _cycle(document: Document, chance: random.Random) -> Document:
    names = [f"c{number}" for number in range(chance.randint(1, 5))]
    for index, name in enumerate(names):
        document["steps"][name] = {"uses": "json:dumps", "needs": [names[index - 1]]}
    return document


def _cycle_by_data(document: Document, _chance: random.Random) -> Document:
    document["steps"]["x"] = {"uses": "json:dumps", "with": {"obj": "${{ steps.y.output }}"}}
    document["steps"]["y"] = {"command": "echo ${{ steps.x.output }}"}
    return document


def _wrong_type(document: Document, chance: random.Random) -> Document:
    field, value = chance.choice((
        ("needs", "load"), ("needs", {"load": 1}), ("retry", 3), ("retry", {"max_attempts": "many"}), ("resources", []),
        ("resources", {"cpus": -1}), ("timeout_s", 0), ("timeout_s", "soon"), ("timeout_s", 1e300), ("with", ["x"]),
        ("uses", "json.dumps"), ("uses", ["json:dumps"]), ("foreach", 3), ("foreach", "all"), ("when", "yes"),
        ("when", 1),
        ("max_parallel", 0), ("env", {"variables": {"A": 1}}), ("env", {"variables": {"a=b": "c"}}), ("cache", "maybe"),
        ("checkpoint", {"keep": 0}), ("durable", "perhaps"), ("description", 7), ("approval", "yes"),
        ("with", {"a b": 1}),
    ))  # fmt: skip
    _step(document, chance)[field] = value
    return document


def _bad_parameter(document: Document, chance: random.Random) -> Document:
    document.setdefault("parameters", {})["odd"] = chance.choice((
        {"type": "list"}, {}, {"type": "int", "default": "x"}, {"type": "int", "default": 3, "max": 2}, "int", None,
        {"type": "str", "default": "a", "choices": ["b" * 2_000] * 100}, {"type": "bool", "default": 1}, ["int"],
    ))  # fmt: skip
    return document


def _nul(document: Document, chance: random.Random) -> Document:
    found = [place for place in places(document) if isinstance(_at(document, place), str)]
    place = chance.choice(found)
    _at(document, place[:-1])[place[-1]] += "\x00"
    return document


def _no_name(document: Document, chance: random.Random) -> Document:
    document["name"] = chance.choice((None, "", 7, "a b", "a\nb", "-a", "nаme", "x" * 100_000, ["p"]))
    return document


def _no_steps(document: Document, chance: random.Random) -> Document:
    document["steps"] = chance.choice(
        (None, {}, [], "load", [{"uses": "json:dumps"}], {"a": None}, {"a": "json:dumps"})
    )
    return document


def _too_deep(document: Document, chance: random.Random) -> Document:
    inner: Document = {"name": "leaf", "steps": {"a": {"uses": "json:dumps"}}}
    for _ in range(chance.choice((9, 20, 60))):
        inner = {"name": "level", "steps": {"a": {"pipeline": inner}}}
    document["steps"]["deep"] = {"pipeline": inner}
    return document


def _deep_value(document: Document, chance: random.Random) -> Document:
    value: Any = 1
    for _ in range(chance.choice((300, 800))):
        value = [value] if chance.random() < 0.5 else {"x": value}
    document["steps"]["deep"] = {"uses": "json:dumps", "with": {"obj": value}}
    return document


def _many_problems(document: Document, chance: random.Random) -> Document:
    kind = chance.choice(({"uses": "x"}, {"uses": "m:f", "needs": ["nobody"]}, {"uses": "m:f", "x\ny": 1}))
    document["steps"] |= {f"s{number}": dict(kind) for number in range(300)}
    return document


WRONG: tuple[Wrong, ...] = (
    _unknown_field, _look_alike_field, _odd_step_name, _no_kind, _two_kinds, _unknown_need, _unknown_reference, _cycle,
    _cycle_by_data, _wrong_type, _bad_parameter, _nul, _no_name, _no_steps, _too_deep, _deep_value, _many_problems,
)  # fmt: skip
