"""`.litertlm`: a finished bundle's TFLite model, tokenizer and template as one file, for LiteRT-LM's own engine.

Nothing is computed anew, so the gate's result for the bundle holds for the file. Every cache is declared as opaque state to the
engine, which therefore sees no end of a ring.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gemma_edge.bundle.accelerators import CPU, GPU
from gemma_edge.bundle.manifest import Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.files import replacing
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import TOKENIZER_FILE, Tokenizer

ENDLESS = 1 << 20  # tokens of a conversation; the engine needs a number
PACKAGE = "litert_lm_builder"
# ENGINE: what the engine is told, by what the model was made for. On a GPU it would choose float16, in which the angles of rotary
# embeddings go wrong. A model for the CPU would answer nonsense there without an error, so it is marked for the CPU only.
ENGINE: dict[str, dict[str, str]] = {CPU: {"backend_constraint": CPU}, GPU: {"prefer_activation_type": "fp32"}}


def write_litertlm(bundle: Path, out: Path, *, force: bool = False) -> None:
    """Write the file; it appears complete or not at all.

    Raises:
        InputError: the bundle cannot become one, `out` exists and `force` is False, or it cannot be written.
    """
    manifest = Manifest.load(bundle)
    if "tflite" not in manifest.backends:
        raise InputError(
            f"{bundle} holds no tflite backend, only {', '.join(manifest.backends)}; export with `backend` tflite"
        )
    if not manifest.tokenizer:
        raise InputError(
            f"{bundle} has no tokenizer, and LiteRT-LM takes text; export a folder with a {TOKENIZER_FILE}"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError("litert-lm-builder is not installed: pip install 'gemma-edge[litertlm]'")
    if out.exists() and not force:
        raise InputError(f"{out} exists; pass `force` to replace it, or `out` for another file")
    try:
        with TemporaryDirectory() as folder, replacing(out) as partial, partial.open("wb") as file:
            _builder(bundle, manifest, Path(folder)).build(file)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; pass `out` for another place") from None


def _builder(bundle: Path, manifest: Manifest, folder: Path) -> Any:
    """The sections; `folder` is for the small ones, which the library reads from files."""
    from litert_lm_builder import litertlm_builder as library

    entry = manifest.backends["tflite"]
    program = confined(bundle, entry.settings.program)
    for name, message in (("llm", _llm(bundle, manifest)), ("executor", _executor(program))):
        (folder / name).write_bytes(message.SerializeToString())
    made = library.LitertLmFileBuilder()
    made.add_system_metadata(library.Metadata("Authors", "gemma-edge", library.DType.STRING))
    made.add_llm_metadata(str(folder / "llm"))
    made.add_executor_metadata(str(folder / "executor"))
    made.add_hf_tokenizer(str(confined(bundle, TOKENIZER_FILE)))
    with redirect_stdout(None):  # it prints what it adds
        made.add_tflite_model(str(program), library.TfLiteModelType.PREFILL_DECODE, **ENGINE[entry.accelerator])
    return made


def _llm(bundle: Path, manifest: Manifest) -> Any:
    """Tokens and template."""
    message = importlib.import_module(f"{PACKAGE}.runtime.proto.llm_metadata_pb2").LlmMetadata()
    message.start_token.token_ids.ids.append(manifest.config.bos_token_id)
    for token in sorted(Tokenizer(bundle, manifest).stop_ids):
        message.stop_tokens.add().token_ids.ids.append(token)
    message.max_num_tokens = ENDLESS
    message.llm_model_type.generic_model.SetInParent()
    turns = turns_of(ChatTemplate.from_bundle(bundle))
    user, model = message.prompt_templates.user, message.prompt_templates.model
    user.prefix, user.suffix, model.prefix, model.suffix = turns
    return message


def turns_of(template: ChatTemplate) -> tuple[str, str, str, str]:
    """What a template puts before and after the user's words and the model's.

    The engine gives templates its own kind of message, in which Gemma 2's finds no text; these four pieces it takes.

    Raises:
        InputError: the template makes more of a conversation than its turns one after the other.
    """
    question, answer = "the question", "the answer"
    user = {"role": "user", "content": question}
    first = template.render([user], add_generation_prompt=False)
    opened = template.render([user])
    whole = template.render([user, {"role": "assistant", "content": answer}, user], add_generation_prompt=False)
    before, _, after = first.removeprefix(template.bos).partition(question)
    opening = opened.removeprefix(first)
    closing = whole.partition(answer)[2].partition(before)[0]
    if whole != f"{first}{opening}{answer}{closing}{before}{question}{after}":
        raise InputError(
            "the chat template is more than what stands before and after each turn, which is all that LiteRT-LM takes;"
            " use gemma-run, or a folder with another chat_template.jinja"
        )
    return before, after, opening, closing


def _executor(program: Path) -> Any:
    """Which inputs come back as outputs."""
    from gemma_edge.export.tflite.check import TFLite

    protos = importlib.import_module(f"{PACKAGE}.runtime.proto.executor_metadata_pb2")
    message = protos.ExecutorMetadata()
    for name in TFLite(program).states("decode"):
        state = message.llm_executor_metadata.state_buffers.add()
        state.prefill_input_name = state.prefill_output_name = name
        state.decode_input_name = state.decode_output_name = name
        state.type = protos.StateBuffer.TYPE_LINEAR_ATTENTION
    return message
