"""Compares answers with the shapes of the dialect's (tests/fixtures/*.shape): element by element, type by type."""

import xml.etree.ElementTree as ET

from harness import FIXTURES


def shape(name):
    """[(path, kind)] of a fixture."""
    lines = (FIXTURES / f"{name}.shape").read_text().splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#")]


def kind(value):
    """The XML-RPC type of a <value>, as it stands in the bytes. A value without one is a string."""
    return value[0].tag if len(value) else "string"


def answer(raw):
    """The <value> of an answer's bytes."""
    return ET.fromstring(raw).find("params/param/value")


def fault(raw):
    return ET.fromstring(raw).find("fault/value")


def found(value, path="."):
    """Every (path, type) in a value. An array's elements are both `[]` and `[n]`."""
    yield path, kind(value)
    base = "" if path == "." else path
    if kind(value) == "struct":
        for member in value[0].findall("member"):
            name = member.find("name").text
            yield from found(member.find("value"), f"{base}/{name}" if base else name)
    elif kind(value) == "array":
        for number, element in enumerate(value[0].findall("data/value")):
            yield from found(element, f"{base}[]")
            if len(value[0].findall("data/value")) < 8 and "[]" not in path:
                yield from found(element, f"{base}[{number}]")


def missing(name, value):
    """What of the shape is not in the value, or of another type."""
    ours = {}
    for path, its in found(value):
        ours.setdefault(path, set()).add(its)
    return [
        f"{path}: {wanted}, ours: {sorted(ours.get(path, {'missing'}))}"
        for path, wanted in shape(name)
        if ours.get(path) != {wanted}
    ]


def leaf_is(text, wanted):
    if wanted in ("node", "empty"):
        return not text
    if wanted == "integer":
        return text.lstrip("-").isdigit()
    if wanted == "hex":
        return text.startswith("0x") and int(text, 16) >= 0
    if wanted == "colons":
        parts = text.split(":")
        return len(parts) == 16 and all(len(part) == 2 and int(part, 16) >= 0 for part in parts)
    return {"Flag": text in ("True", "False"), "flag": text in ("true", "false"), "text": True}[wanted]


def missing_in_document(name, document):
    """The same for an XML document inside a string. `?` marks parts that only some machines have."""
    values = {}

    def walk(element, path):
        values.setdefault(path, []).append((element.text or "") if not len(element) else "")
        for key, text in element.attrib.items():
            values.setdefault(f"{path}@{key}", []).append(text)
        for child in element:
            walk(child, f"{path}/{child.tag}")

    root = ET.fromstring(document)
    walk(root, root.tag)
    wrong = []
    for path, wanted in shape(name):
        if path not in values:
            if not wanted.endswith("?"):
                wrong.append(f"{path} is missing")
        else:
            wrong += [f"{path}: {text!r} is not {wanted}" for text in values[path] if not leaf_is(text, wanted.rstrip("?"))]
    return wrong
