"""Writes a Llama model of transformers as a float32 GGUF file, so that llama.cpp runs the very same weights.

    python -m bench.gguf_weights models/celeriac-mini /tmp/mini.gguf

The file has no tokenizer, since the benchmarks use token ids. Needs `pip install gguf`.
"""

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

NAME_BY_MODULE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path) -> None:
    """Raises ValueError if the model is not a plain Llama."""
    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"{config.model_type} with rope {config.rope_parameters} is not a plain Llama")
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_shape(writer, config)
    weights = model.state_dict()
    _add(writer, "token_embd", weights["model.embed_tokens.weight"])
    _add(writer, "output_norm", weights["model.norm.weight"])
    if not config.tie_word_embeddings:
        _add(writer, "output", weights["lm_head.weight"])
    num_heads_by_module = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    for number in range(config.num_hidden_layers):
        for module, name in NAME_BY_MODULE.items():
            weight = weights[f"model.layers.{number}.{module}.weight"]
            if module in num_heads_by_module:
                weight = _interleave(weight, num_heads_by_module[module])
            _add(writer, f"blk.{number}.{name}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight.float().numpy()))


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp rotates neighbouring dimensions of a Llama, transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a repository on the hub")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write_gguf(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32), arguments.file)


if __name__ == "__main__":
    main()
