"""The flags that choose a template, and what the command says of what it did."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_record, tiny_hugging_face, write_jsonl
from template_jobs import MARKED, UNMARKED

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.jinja_templates import JinjaTemplate
from megatron_multiturn.preprocess import main
from megatron_multiturn.store import SessionStore
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.template_flags import add_template_flags, build_template
from megatron_multiturn.templates import ChatTemplate, rendering_text


class NoTokens:
    """What building a template asks of a vocabulary."""

    def control_tokens(self) -> list[Any]:
        return []

    def named_tokens(self) -> dict[str, str]:
        return {"bos_token": "<s>"}


def built(*flags: str, own: Any = None) -> ChatTemplate:
    parser = argparse.ArgumentParser()
    add_template_flags(parser)
    tokenizer = argparse.Namespace(tokenizer=argparse.Namespace(chat_template=own))
    vocabulary: Any = NoTokens()
    return build_template(parser.parse_args(flags), vocabulary, tokenizer)


@pytest.fixture
def template_file(tmp_path: Path) -> str:
    path = tmp_path / "made.jinja"
    path.write_text(UNMARKED, encoding="utf-8")
    return str(path)


def test_a_built_in_template() -> None:
    assert built("--template", "vicuna") is TEMPLATES["vicuna"]


def test_a_template_of_a_file(template_file: str) -> None:
    template = built("--chat-template", template_file)
    assert isinstance(template, JinjaTemplate)
    assert template.name == "made.jinja"


@pytest.mark.parametrize(
    "flags",
    [
        ("--history-rewriting", "last"),
        ("--generation-markers", "verbatim"),
        ("--template-variables", "{}"),
    ],
)
def test_flags_without_effect_are_refused(flags: tuple[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=f"^{flags[0]}: has no effect on the built-in .* 'chatml'"
    ):
        built("--template", "chatml", *flags)


def test_variables_that_all_templates_are_given_are_refused(template_file: str) -> None:
    with pytest.raises(ConfigError, match="--template-variables sets 'messages'"):
        built("--chat-template", template_file, "--template-variables", '{"messages": []}')


@pytest.mark.parametrize("own", [UNMARKED, {"default": UNMARKED, "tool_use": "x"}])
def test_the_tokenizers_own_template(own: Any, template_file: str) -> None:
    template = built("--chat-template", "tokenizer", own=own)
    assert template.content_hash == built("--chat-template", template_file).content_hash


@pytest.mark.parametrize("own", [None, "  ", {"tool_use": "x"}])
def test_a_tokenizer_without_a_template(own: Any) -> None:
    with pytest.raises(
        ConfigError, match="tokenizer has no chat template; pass a file, or --templ"
    ):
        built("--chat-template", "tokenizer", own=own)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--chat-template", "no/such.jinja"], r"no/such.jinja: cannot be read \(No such file"),
        (["--chat-template", "/"], r"--chat-template /: cannot be read \(Is a directory\)"),
        (["--template-variables", "{"], r"--template-variables: not JSON \(.*\); pass an object"),
        (["--template-variables", "[1]"], r"--template-variables \[1\]: must be a JSON object"),
        (["--template-date", "today"], r"--template-date today: is no date; pass one like 2026-01"),
    ],
)
def test_wrong_flags(flags: list[str], match: str, template_file: str) -> None:
    if flags[0] != "--chat-template":
        flags = ["--chat-template", template_file, *flags]
    with pytest.raises(ConfigError, match=match):
        built(*flags)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff{{", r"bad.jinja: is not UTF-8 text; convert it"),
        (b"x" * (1 << 20) + b"x", r"bad.jinja: 1,048,577 bytes are no template; pass a Jinja file"),
    ],
)
def test_files_that_are_no_template(data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=match):
        built("--chat-template", str(path))


def test_variables_and_the_date(tmp_path: Path) -> None:
    from session_fixtures import make_session

    path = tmp_path / "dated.jinja"
    path.write_text("{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ who }} " + UNMARKED)
    flags = ["--template-variables", '{"who": "me"}', "--template-date", "2026-01-31"]
    template = built("--chat-template", str(path), *flags)
    (document,) = template.documents(make_session(1))
    assert rendering_text(document.segments).startswith("<s>31 Jan 2026 me<|im_start|>user")
    other = built("--chat-template", str(path), *flags[:3], "2026-02-01")
    assert other.content_hash != template.content_hash


def run(tmp_path: Path, source: str, *flags: str, **record: Any) -> int:
    importlib.import_module("megatron_multiturn.megatron_compat")
    path = tmp_path / "made.jinja"
    path.write_text(source, encoding="utf-8")
    data = write_jsonl(tmp_path / "a.jsonl", [make_record(2, **record)] * 2)
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
    tokenizer += ["--tokenizer-model", tiny_hugging_face(), "--workers", "1"]
    prefix = str(tmp_path / "out" / "data")
    given = ["--input", data, "--output-prefix", prefix, "--chat-template", str(path)]
    return main([*given, *tokenizer, *flags])


def test_a_chat_template_makes_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [{"name": "look"}]
    assert run(tmp_path, MARKED, tools=tools, chat_template_kwargs={"note": "n"}) == 0
    assert "note:" not in capsys.readouterr().out
    manifest = SessionStore.open(str(tmp_path / "out" / "data")).manifest
    assert (manifest.template.name, manifest.counts.turns) == ("made.jinja", 4)


def test_answers_without_an_end_are_noted_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = MARKED.replace("{% generation %}{{ body }}", "{% generation %}{{ m.content }}")
    source = source.replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>\n", 1)
    assert run(tmp_path, source) == 0
    assert (
        "note: 4 turns do not end with a control token, so that the model does not learn to stop; "
        "put the template's closing token into its {% generation %} block"
    ) in capsys.readouterr().out


def test_rewritten_histories_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = UNMARKED.replace("{{- m.content }}", "{{- m.content if loop.last else '...' }}")
    source = source.replace("if loop.last", "if m.role == 'user' or loop.last")
    assert run(tmp_path, source) == 0
    out = capsys.readouterr().out
    assert "note: 2 sessions have a history that the template rewrites, see --history-rew" in out
    assert SessionStore.open(str(tmp_path / "out" / "data")).manifest.counts.turns == 4
    assert run(tmp_path, source, "--overwrite", "--history-rewriting", "error") == 1
    assert "rewrites message 2 when later messages follow; pass" in capsys.readouterr().err


def test_a_template_that_runs_for_ever_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_multiturn import containment

    monkeypatch.setattr(containment, "MAX_SECONDS", 0.5)
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert run(tmp_path, source) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "a.jsonl:1: template made.jinja was stopped, as it runs for more than 0.5 s" in err
    assert not list((tmp_path / "out").glob("*.json"))


def test_refused_control_tokens_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]
    skip = ["--literal-control-tokens", "error", "--on-bad-session", "skip"]
    data = [make_record(1), {"messages": messages}]
    path = write_jsonl(tmp_path / "b.jsonl", [json.dumps(one) for one in data])
    assert run(tmp_path, UNMARKED, "--input", path, *skip) == 0
    assert "1 control-token-in-text" in capsys.readouterr().out
