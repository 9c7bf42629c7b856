"""The dashboard's modules, read and run without a browser: nothing becomes HTML, and what they name exists."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.app import create_app
from api.openapi import document_of
from dialects.openai_chat import ChatCompletionBody
from domain.catalog import Catalog
from domain.jobs import BATCH_PRIORITY, MIN_PRIORITY
from domain.requests import SamplingParams
from domain.structured_output import StructuredOutput
from settings import ROOT, Settings

STATIC = ROOT / "api" / "static"
DASHBOARD = STATIC / "dashboard"
MODULES = sorted(DASHBOARD.glob("*.js"))
MAX_LINES = 450
MAKES_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|dangerouslySetInnerHTML|\beval\(|new Function|srcdoc"
)
INLINE = re.compile(r"\son[a-z]+=[\"']|\sstyle=[\"']|javascript:|<style|<script(?! src=)", re.IGNORECASE)
WORDS = re.compile(r"[\"`](v1/[^\"`?]*|health)[\"`]")

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(*arguments: str, stdin: str = "", folder: Path | None = None) -> str:
    done = subprocess.run(
        [NODE or "node", *arguments], input=stdin, capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_text_becomes_html_and_nothing_is_inline() -> None:
    for file in [*MODULES, STATIC / "index.html"]:
        text = file.read_text()
        assert not (found := MAKES_HTML.search(text)), (file.name, found)
        assert not (found := INLINE.search(text)), (file.name, found)


def test_modules_are_short_and_say_what_they_are_for() -> None:
    for file in [*MODULES, *DASHBOARD.glob("*.css")]:
        text = file.read_text()
        assert text.startswith(("// ", "/* ")), file.name
        assert len(text.splitlines()) <= MAX_LINES, file.name


def test_every_module_is_loaded_and_every_import_exists() -> None:
    waiting = [DASHBOARD / "app.js", DASHBOARD / "theme.js"]
    loaded: set[Path] = set()
    while waiting:
        module = waiting.pop()
        if module in loaded:
            continue
        loaded.add(module)
        waiting += [
            (module.parent / target).resolve() for target in re.findall(r'\bfrom ?"([^"\n]+[.]js)"', module.read_text())
        ]
    assert {module for module in loaded if module.parent == DASHBOARD} == set(MODULES)
    assert all(module.is_relative_to(STATIC) for module in loaded)


def test_what_is_vendored_has_its_licence() -> None:
    for folder in ("preact", "uplot", "swagger-ui"):
        assert list((STATIC / folder).glob("LICENSE*")), folder


def test_every_path_that_the_modules_ask_is_published(tmp_path: Path) -> None:
    catalog = Catalog([])
    published = document_of(create_app(Settings(database_url="postgresql://localhost/none"), catalog))["paths"]
    asked = {path for module in MODULES for path in WORDS.findall(module.read_text())}
    assert len(asked) > 12
    for path in asked:
        told = re.sub(r"\$\{[^}]*\}", "*", path).split("/")
        assert any(_match(told, one.strip("/").split("/")) for one in published), f"{path} is not in the API"


def _match(told: list[str], published: list[str]) -> bool:
    return len(told) == len(published) and all(
        here == there or here == "*" or (there.startswith("{") and "*" in here)
        for here, there in zip(told, published, strict=True)
    )


def test_the_playground_has_every_sampling_parameter_and_format() -> None:
    text = (DASHBOARD / "parameters.js").read_text()
    names = re.findall(r'\{ name: "(\w+)", kind:', text)
    assert sorted(names) == sorted(SamplingParams.model_fields.keys() - {"structured_output"})
    formats = re.findall(r'^  (\w+): \{ label: "', text, re.MULTILINE)
    assert sorted(formats) == sorted(StructuredOutput.model_fields.keys() - {"calls"})


@needs_node
def test_modules_are_valid() -> None:
    for file in MODULES:
        node("--input-type=module", "--check", stdin=file.read_text())


@needs_node
def test_what_a_user_types_is_refused_or_kept_but_never_raises(tmp_path: Path) -> None:
    for name in ("api.js", "hooks.js", "json.js", "kept.js"):
        shutil.copy(DASHBOARD / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "html.js").write_text("export const useCallback = 0, useEffect = 0, useRef = 0, useState = 0;")
    program = """
        const { isPossibleKey } = await import("./api.js");
        const { addressOf } = await import("./hooks.js");
        const keys = ["sk_a_b-c", "", "sk_a b", "sk_a_\u00fc", "sk_\u201ca", "sk_a\\nb"];
        const paths = ["#/jobs/%E0%A4", "#/a/b%2Fc"].map((hash) => addressOf(hash).path);
        console.log(JSON.stringify([keys.map(isPossibleKey), ...paths]));
    """
    possible, broken, whole = json.loads(node("--input-type=module", "-e", program, folder=tmp_path))
    assert possible == [True, False, False, False, False, False]
    assert broken == ["jobs", "%E0%A4"]
    assert whole == ["a", "b/c"]


BODY: dict[str, Any] = {
    "kind": "generation",
    "model": "a",
    "prompt": None,
    "messages": [{"role": "user", "content": 'It\'s "quoted" \\ and\nbroken ${x} `y` \u202eback'}],
    "tools": [{"name": "f", "parameters": {"type": "object"}, "strict": None}],
    "params": {"max_tokens": 5, "seed": 2**63 - 1, "temperature": 0.5, "n": 1, "top_k": 7, "stop": []},
}


def code_of(asked: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str, str, str]:
    """The body that asks for the same again, and the code of each tab."""
    for name in ("request.js", "json.js"):
        shutil.copy(DASHBOARD / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "asked.json").write_text(json.dumps(asked).replace(str(2**63 - 1), "17"))
    program = """
        globalThis.document = { baseURI: "http://localhost:8000/" };
        const { readFileSync } = await import("node:fs");
        const { asCurl, asOpenAI, asPython, bodyOf } = await import("./request.js");
        const body = bodyOf(JSON.parse(readFileSync("asked.json")));
        console.log(JSON.stringify([body, asCurl(body, true), asPython(body), asOpenAI(body)]));
    """
    body, curl, python, openai = json.loads(node("--input-type=module", "-e", program, folder=folder))
    return body, curl, python, openai


@needs_node
def test_the_code_of_a_job_makes_the_same_job(tmp_path: Path) -> None:
    body, curl, python, openai = code_of(BODY, tmp_path)
    assert "\u202e" not in curl + python + openai  # it would show the code in another order than it runs
    assert body == {
        "model": "a",
        "messages": BODY["messages"],
        "tools": BODY["tools"],
        "params": {"max_tokens": 5, "seed": 17, "temperature": 0.5, "top_k": 7},
    }
    words = shlex.split(curl.replace("\\\n", ""))
    assert json.loads(words[words.index("-d") + 1]) == body
    assert "authorization: Bearer $CELERIAC_API_KEY" in words
    submit = _call(python, "submit")
    assert submit == {"model": "a", "tools": BODY["tools"]} | body["params"]
    create = _call(openai, "create")
    assert create["messages"] == BODY["messages"]
    assert create["tools"] == [{"type": "function", "function": BODY["tools"][0]}]
    assert create["extra_body"] == {"top_k": 7}
    assert (create["max_tokens"], create["seed"]) == (5, 17)


@needs_node
def test_a_line_of_a_batch_is_asked_again_with_a_priority_that_may_be_asked_for(tmp_path: Path) -> None:
    for name in ("request.js", "json.js"):
        shutil.copy(DASHBOARD / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    program = """
        const { askedOf, bodyOf } = await import("./request.js");
        const input = { model: "a", prompt: "b" };
        const bodies = JSON.parse(process.argv[1]).map((priority) => bodyOf(askedOf({ input, priority })));
        console.log(JSON.stringify(bodies.map((body) => body.priority ?? null)));
    """
    priorities = json.dumps([BATCH_PRIORITY, MIN_PRIORITY, 0, 5])
    asked = json.loads(node("--input-type=module", "-e", program, priorities, folder=tmp_path))
    assert asked == [None, MIN_PRIORITY, None, 5]


@needs_node
def test_calls_of_tools_are_written_as_the_openai_sdk_wants_them(tmp_path: Path) -> None:
    call = {"id": "c1", "name": "f", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    calls = {"format": "hermes", "tools": [{"name": "f", "arguments": {}}], "is_single": False}
    for form, choice, extra in (
        ({"json_schema": None, "calls": calls}, "required", None),
        ({"calls": calls | {"is_single": True}}, {"type": "function", "function": {"name": "f"}}, None),
        ({"regex": "a+", "calls": calls}, None, {"structured_output": {"regex": "a+"}}),
    ):
        asked = BODY | {"messages": messages, "params": {"n": 1, "structured_output": form}}
        create = _call(code_of(asked, tmp_path)[3], "create")
        ChatCompletionBody.model_validate({name: value for name, value in create.items() if name != "extra_body"})
        assert create["messages"][1]["tool_calls"] == [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]
        assert create["messages"][2] == messages[2]
        assert (create.get("tool_choice"), create.get("extra_body")) == (choice, extra)


@needs_node
def test_code_for_vectors_long_prompts_and_several_choices(tmp_path: Path) -> None:
    vectors = {"kind": "embedding", "model": "e", "inputs": ["a", "b"], "queries": None, "dimensions": 3}
    _, _, python, openai = code_of(vectors, tmp_path)
    assert _call(python, "submit") == {"model": "e", "inputs": ["a", "b"], "dimensions": 3}
    assert _call(openai, "create") == {"model": "e", "input": ["a", "b"], "dimensions": 3}
    asked = {"model": "a", "prompt": "it's long " * 20_000, "params": {"n": 2}, "metadata": {"who": "x"}, "priority": 0}
    body, curl, python, openai = code_of(asked, tmp_path)
    assert "priority" not in body
    assert body["metadata"] == {"who": "x"}
    [text] = re.findall(r"--data-binary @- <<'END'\n(.*)\nEND$", curl, re.DOTALL)
    assert json.loads(text) == body
    ast.parse(python)
    assert "stream" not in _call(openai, "create")  # the choices' texts would come mixed


def _call(program: str, method: str) -> dict[str, Any]:
    """The named arguments of the call of a method in a program."""
    [call] = [
        node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    ]
    return {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords if argument.arg}


@needs_node
def test_what_is_wrong_is_said_in_the_words_of_health_also_without_a_database(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "html.js").write_text("export const useRef = (value) => ({ current: value });")
    (tmp_path / "hooks.js").write_text("export const usePolled = (ask) => ask();")
    (tmp_path / "api.js").write_text(
        """export const get = async (path) => {
            if (path !== "health") throw new Error("503");
            return { database: "unavailable", reasons: ["it is away; start it", "so is Redis"], models_unloaded: ["a"],
                workers_drained_since: { "gpu@here": "2026" } };
        };"""
    )
    shutil.copy(DASHBOARD / "live.js", tmp_path)
    program = """
        const { findingsOf, useLive } = await import("./live.js");
        console.log(JSON.stringify(findingsOf(await useLive(false))));
    """
    found = json.loads(node("--input-type=module", "-e", program, folder=tmp_path))
    assert [one["text"] for one in found[:2]] == ["It is away; start it.", "So is Redis."]
    assert [one["tone"] for one in found] == ["bad", "bad", "calm", "calm"]
