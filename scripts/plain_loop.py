"""A training step as it is written with transformers and PEFT alone: what `check_gpu.py` times this project against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def plain_loop(assembly: Any, device: str) -> Callable[[list[tuple[Any, list[int], list[int]]]], None]:
    """A step as it is written with transformers and PEFT alone: a sequence a question, padded, one AdamW.

    Sizes, precision, LoRA and learning rate are the assembly's; the Q-Former is `Blip2QFormerModel`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Blip2QFormerConfig, Blip2QFormerModel

    from qformer.precision import nf4_config
    from qformer.sources import resolve

    recipe, sizes = assembly.recipe, assembly.model.bridge.config
    dtype = assembly.model.language.compute_dtype
    llm = AutoModelForCausalLM.from_pretrained(
        resolve(recipe.language.source), dtype=dtype, device_map={"": device}, quantization_config=nf4_config(dtype)
    )
    lora = recipe.language.lora
    llm = get_peft_model(
        llm, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear")
    )
    former = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size,
            encoder_hidden_size=sizes.encoder_width,
            cross_attention_frequency=sizes.cross_attention_every,
        )
    ).to(device)
    queries = torch.nn.Parameter(torch.randn(1, sizes.num_queries, sizes.hidden_size, device=device) * 0.02)
    projection = torch.nn.Linear(sizes.hidden_size, llm.config.hidden_size, device=device)
    trained = [queries, *former.parameters(), *projection.parameters()]
    trained += [parameter for parameter in llm.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay)
    words = llm.get_input_embeddings()
    former.train()
    llm.train()

    def step(rows: list[tuple[Any, list[int], list[int]]]) -> None:
        features = torch.cat([row[0] for row in rows]).to(device).float()  # [B, P, D]
        seen = former(query_embeds=queries.expand(len(rows), -1, -1), encoder_hidden_states=features)
        soft = projection(seen.last_hidden_state)  # [B, Q, D_l]
        longest = max(len(own) + len(answer) for _, own, answer in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), sizes.num_queries + longest), -100)
        mask = torch.zeros(len(rows), sizes.num_queries + longest, dtype=torch.long)
        for place, (_, own, answer) in enumerate(rows):
            end = len(own) + len(answer)
            ids[place, :end] = torch.tensor([*own, *answer])
            labels[place, sizes.num_queries + len(own) : sizes.num_queries + end] = torch.tensor(answer)
            mask[place, : sizes.num_queries + end] = 1
        embeds = torch.cat([soft.to(dtype), words(ids.to(device)).to(dtype)], dim=1)  # [B, Q + T, D_l]
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            llm(inputs_embeds=embeds, attention_mask=mask.to(device), labels=labels.to(device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.train.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
