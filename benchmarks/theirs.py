"""Times transformers on PyTorch: the same step, decoding, sizes and dtypes as `ours.py`.

Uses its fastest standard setting: SDPA attention, frozen weights in bfloat16, trained ones in
float32 under autocast, fused AdamW on a GPU. Prints one JSON object as its last line.
"""

import argparse
import json

import torch
import transformers

from benchmarks.workload import TRAIN_BATCH, Lengths, seconds
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import Variant

TRAINED = ("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm.")


def config_of(variant: Variant) -> transformers.InstructBlipConfig:
    """Returns transformers' config with the sizes of `variant`."""
    v, q, m = variant.vision, variant.qformer, variant.llm
    if m.kind == "t5":
        text = dict(
            model_type="t5",
            d_model=m.width,
            d_kv=m.head_width,
            d_ff=m.mlp,
            num_layers=m.encoder_layers,
            num_decoder_layers=m.decoder_layers,
            num_heads=m.heads,
            vocab_size=m.vocab,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    else:
        text = dict(
            model_type="llama",
            hidden_size=m.width,
            intermediate_size=m.mlp,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            vocab_size=m.vocab,
            pad_token_id=m.pad_id,
            bos_token_id=m.bos_id,
            eos_token_id=m.eos_id,
        )
    return transformers.InstructBlipConfig(
        vision_config=dict(
            hidden_size=v.width,
            intermediate_size=v.mlp,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
        ),
        qformer_config=dict(
            hidden_size=q.width,
            intermediate_size=q.mlp,
            num_hidden_layers=q.layers,
            num_attention_heads=q.heads,
            vocab_size=q.vocab,
            encoder_hidden_size=v.width,
        ),
        text_config=text,
        num_query_tokens=q.queries,
        image_token_index=m.vocab - 1,
    )


def build_model(variant: Variant, device: torch.device) -> torch.nn.Module:
    """Returns stock InstructBLIP with random bfloat16 weights, created on `device`."""
    config = config_of(variant)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.InstructBlipForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    return model


def random_inputs(variant: Variant, size: int, lengths: Lengths, training: bool, device) -> dict:
    """Returns inputs of the same shapes as `ours.random_batch`, in transformers' layout."""
    generator = torch.Generator().manual_seed(0)
    v, q, m = variant.vision, variant.qformer, variant.llm
    ids = lambda width, vocab: torch.randint(3, vocab, (size, width), generator=generator)
    vocab = min(m.vocab, 32000)
    image = torch.full((size, q.queries), m.vocab - 1)
    tokens = torch.cat([image, ids(lengths.prompt, vocab - 1)], dim=1)
    answer = ids(lengths.answer, vocab - 1)
    made = {
        "pixel_values": torch.randn(size, 3, v.image_size, v.image_size, generator=generator),
        "qformer_input_ids": ids(lengths.instruction, q.vocab),
    }
    if training and m.kind == "t5":
        made["labels"] = answer
    elif training:
        made["labels"] = torch.cat([torch.full(tokens.shape, -100), answer], dim=1)
        tokens = torch.cat([tokens, answer], dim=1)
    made["input_ids"] = tokens
    made["attention_mask"] = torch.ones_like(tokens)
    made["qformer_attention_mask"] = torch.ones_like(made["qformer_input_ids"])
    return {name: value.to(device) for name, value in made.items()}


def wait(device: torch.device) -> None:
    """Waits until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_training(variant: Variant, model, batch: int, lengths: Lengths, repeats: int) -> dict:
    """Returns seconds per step and samples per second at the largest batch that fits, as a dict.

    Starts from `batch` and halves it while memory runs out.
    """
    device = next(model.parameters()).device
    model.train()
    model.vision_model.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.05, fused=device.type == "cuda")
    tried = []
    while batch:
        inputs = random_inputs(variant, batch, lengths, True, device)
        box = {}

        def once(inputs=inputs, box=box):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            box["loss"] = loss.item()

        try:
            took = seconds(once, repeats)
        except torch.OutOfMemoryError:
            tried.append(batch)
            batch //= 2
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        rate = batch / took["median"]
        return {
            "batch": batch,
            "out_of_memory_at": tried,
            "seconds": took,
            "samples_per_second": rate,
            "loss": box["loss"],
        }
    return {"out_of_memory_at": tried}


@torch.no_grad()
def time_decoding(variant: Variant, model, batch: int, lengths: Lengths, repeats: int) -> dict:
    """Returns the seconds for image, prompt and `lengths.new` greedy tokens of `batch` rows.

    Also tokens per second, as a dict.
    """
    device = next(model.parameters()).device
    model.eval()
    inputs = random_inputs(variant, batch, lengths, False, device)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)

    def answer(new: int):
        model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=new, min_new_tokens=new
        )
        wait(device)

    whole = seconds(lambda: answer(lengths.new), repeats)
    return {
        "batch": batch,
        "new_tokens": lengths.new,
        "seconds": whole,
        "tokens_per_second": batch * lengths.new / whole["median"],
    }


def main() -> None:
    """Measures one variant and prints the results as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--batch", type=int, default=None, help="training batch to start from")
    parser.add_argument("--decode_batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variant, lengths = get_variant(flags.variant), Lengths.of(flags.variant)
    torch.manual_seed(0)
    model = build_model(variant, device)
    result = {
        "side": "transformers",
        "variant": flags.variant,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "decode": [
            time_decoding(variant, model, size, lengths, flags.repeats)
            for size in flags.decode_batches
        ],
    }
    batch = flags.batch or TRAIN_BATCH.get(flags.variant, 8)
    result["train"] = time_training(variant, model, batch, lengths, flags.repeats)
    if device.type == "cuda":
        result["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(result))


if __name__ == "__main__":
    main()
