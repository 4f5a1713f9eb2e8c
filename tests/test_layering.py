"""Imports point one way, and what needs neither torch nor Megatron imports neither."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_multiturn"

# Any module may import these.
LEAVES = ("_version", "errors", "modes", "turn_weights", "megatron_compat", "megatron_hooks")

# A module may import only those named before it.
ORDER = (
    # raw sessions -> dataset on disk
    *("input_files", "parquet_records", "json_lists", "record_blocks", "records", "shards"),
    *("messages", "fields", "tool_fields", "entries", "chat_formats", "question_formats"),
    *("sessions", "supervision", "templates", "round_templates"),
    *("template_families", "control_tokens", "turn_spans", "template_input"),
    *("append_only", "containment", "sandbox", "renderings"),
    *("rendered_session", "jinja_templates", "library_tokenizers", "vocabulary", "run_encoder"),
    *("engines", "text_groups", "layouts", "message_layouts", "layout_columns"),
    *("plain_chats", "prompt_variants"),
    *("encoded_sessions", "batch_encoding", "encoding"),
    *(
        "index_file",
        "manifest",
        "input_hashes",
        "batch_checks",
        "spooled_columns",
        "session_writer",
    ),
    *(
        "held_signals",
        "renewed_process",
        "encoding_pool",
        "tally",
        "unfinished",
        "journal",
        "shard_files",
        "progress",
    ),
    # dataset -> rows -> training
    *("shared_files", "object_storage", "row_pieces", "token_reader", "store"),
    *("targets", "cutting", "windows", "packing", "averages", "samples", "plan_cache", "dataset"),
    *("batches", "balance", "blends", "row_order", "epochs", "resume"),
    *("batch", "saved_output", "attention", "layer_spec", "loss", "moe", "mtp"),
    *("provider_names", "provider", "preflight", "forward"),
    *("refusal", "attention_refusals", "refusals", "given_files", "arguments"),
    *("cpu", "recording", "__main__"),
    # commands
    *("selfcheck_flags", "selfcheck_hooks", "selfcheck_ranks", "selfcheck_report"),
    *("selfcheck_reference", "selfcheck_job", "selfcheck"),
    *("decoding", "row_view", "dataset_statistics"),
    *(
        "tokenizer_flags",
        "template_flags",
        "pipeline",
        "merge",
        "dry_run",
        "preprocess",
    ),
    "inspection",
    *("demo_corpus", "demo_report", "demo"),
)

PURE = (
    *("errors", "modes", "turn_weights"),
    *("input_files", "parquet_records", "json_lists", "record_blocks", "records", "shards"),
    *("messages", "fields", "tool_fields", "entries", "chat_formats", "question_formats"),
    *("sessions", "supervision", "templates", "round_templates"),
    *("template_families", "control_tokens", "turn_spans", "template_input"),
    *("append_only", "containment", "sandbox", "renderings"),
    *("rendered_session", "jinja_templates"),
    *("row_pieces", "targets", "cutting", "windows", "packing", "averages", "samples"),
    *("batches", "balance", "blends"),
)
HEAVY = ("megatron", "pyarrow", "sentencepiece", "torch", "transformers", "zstandard")


def imported_modules(source: str) -> set[str]:
    """The package's modules that a source imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("megatron_multiturn.")}
    return found


def upward_imports(module: str, source: str) -> set[str]:
    """What `module` imports although it may not."""
    allowed = () if module in LEAVES else ORDER[: ORDER.index(module)]
    return imported_modules(source) - set(LEAVES) - set(allowed) - {"__version__"}


def test_every_module_has_its_place() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == {*ORDER, *LEAVES}, "name the module in ORDER, where it belongs"


@pytest.mark.parametrize("module", [*LEAVES, *ORDER])
def test_imports_point_one_way(module: str) -> None:
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert upward_imports(module, source) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_multiturn.loss import loss_func",
        "from megatron_multiturn import loss",
        "import megatron_multiturn.loss",
        "def late():\n    from megatron_multiturn.loss import loss_func",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    assert upward_imports("packing", source) == {"loss"}


def heavy_imports(modules: list[str]) -> list[str]:
    """Which heavy libraries a fresh Python holds once it has imported the modules."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout.split()


def test_the_package_imports_nothing_heavy() -> None:
    assert heavy_imports(["megatron_multiturn"]) == []


def test_the_pure_half_needs_neither_torch_nor_megatron() -> None:
    assert heavy_imports([f"megatron_multiturn.{name}" for name in PURE]) == []


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert "torch" in heavy_imports(["megatron_multiturn.loss"])
