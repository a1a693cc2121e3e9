"""Write a model as Hugging Face's transformers reads it: weights, config, tokenizer.

    python export.py bin/tinystar-v0.2-modernbase.tinystar hf/

    transformers.AutoModelForCausalLM.from_pretrained("hf/")     # the same logits, without this repository

A tinystar becomes a GPT-2, Llama, Mistral, Qwen3, Arcee, DeepSeek-V2, Starcoder2 or StableLM, whichever computes the
same; other models are refused, with the option that none of them has. docs/export.md has the table.
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

from strawberry.argument_parser import ArgumentParser
from strawberry.common import UserError, check_path_arguments, run_cli
from strawberry.huggingface import export
from strawberry.model_file import load_model
from strawberry.outputs import Input, check_outputs
from strawberry.training import checkpoint


def main(argv: list[str]) -> None:
    parser = ArgumentParser("export.py", "Write a model as Hugging Face's transformers reads it.")
    parser.add_argument("model", metavar="MODEL", help="a model file, or a directory of checkpoints")
    parser.add_argument("folder", metavar="FOLDER", help="output: a directory with model.safetensors, config.json, "
                        "generation_config.json, tokenizer.json and tokenizer_config.json")  # fmt: skip
    given = parser.parse_args(argv)
    check_path_arguments(given, "model", "folder")
    path = checkpoint.find_model(given.model, "MODEL")
    check_outputs(export.list_outputs(given.folder), [Input("MODEL", path)])
    model, encoder, _ = load_model(path)
    try:
        name = export.write_export(model, encoder, given.folder)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    print(f"{given.folder}: {name}, {model.num_params(non_embedding=False):,} parameters, {encoder.vocab_size:,} token "
          f"ids; load it with transformers.AutoModelForCausalLM.from_pretrained({given.folder!r})")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
