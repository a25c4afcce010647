"""Models of transformers, as their users have them: same gradients as one process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from laws import double_precision, mean_cross_entropy, problems, stirred

from minipar import Mesh, gpipe, one_f_one_b, parallelize

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=32,
    pad_token_id=0,
)


def double(make):
    """A random model, made in float64, for training, in which nothing is dropped."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return stirred(make().double()).train()
    finally:
        torch.set_default_dtype(usual)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return double(lambda: BertForMaskedLM(config))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, use_cache=False)
    return double(lambda: LlamaForCausalLM(config))


def batch():
    """Rows of unequal length, with a mask, and labels for what it keeps."""
    draw = torch.Generator().manual_seed(2)
    ids, labels = (torch.randint(3, 64, (5, 12), generator=draw) for _ in range(2))
    mask = (torch.arange(12) < torch.tensor([12, 7, 10, 12, 3])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}, labels.masked_fill(mask == 0, -100)


def precise(world):
    """A world whose ranks compute in float64 what these models compute in float32 on purpose."""

    class Precise:
        def run(self, work, *args):
            def run():
                with double_precision():
                    return work(*args)

            return world.run(run)

    return Precise()


def check(world, make, layouts, **options):
    with double_precision():
        return problems(precise(world), layouts, make, *batch(), mean=mean_cross_entropy, **options)


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_a_bert_with_a_mask_is_cut_into_stages(world2, schedule):
    layout = {"mesh": Mesh(pp=2), "microbatches": 2, "schedule": schedule}
    assert check(world2, bert, [layout]) == []


def test_a_bert_is_laid_out_on_every_axis(world4):
    layer = "bert.encoder.layer.*."
    plan = {
        f"{layer}attention.self.query": "colwise",
        f"{layer}attention.self.key": "colwise",
        f"{layer}attention.self.value": "colwise",
        f"{layer}attention.output.dense": "rowwise",
        f"{layer}intermediate.dense": "colwise",
        f"{layer}output.dense": "rowwise",
    }
    meshes = [Mesh(dp=2, pp=2), Mesh(dp=2, tp=2), Mesh(pp=2, tp=2), Mesh(pp=4), Mesh(tp=4)]
    assert check(world4, bert, [{"mesh": mesh, "microbatches": 2} for mesh in meshes], plan=plan) == []


def test_a_llama_is_laid_out_on_every_axis(world4):
    meshes = [Mesh(dp=2, pp=2), Mesh(dp=2, tp=2), Mesh(pp=2, tp=2), Mesh(pp=4)]
    assert check(world4, llama, [{"mesh": mesh, "microbatches": 2} for mesh in meshes]) == []


def test_a_llama_is_cut_as_its_own_plan_says(world2):
    def held():
        parallel = parallelize(llama(), Mesh(tp=2))
        logits = parallel.forward(batch()[0])
        written = parallel.generate(batch()[0]["input_ids"][:2, :4], 3)
        return {name: tuple(p.shape) for name, p in parallel.named_parameters()}, logits, written

    with double_precision():
        model = llama()
    with torch.no_grad(), double_precision():
        wanted = model(**batch()[0]).logits
        written = model.generate(batch()[0]["input_ids"][:2, :4], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    for shapes, logits, text in precise(world2).run(held):
        assert shapes["model.layers.0.self_attn.q_proj.weight"] == (16, 32)
        assert shapes["model.layers.3.self_attn.k_proj.weight"] == (8, 32)
        assert shapes["model.layers.1.self_attn.o_proj.weight"] == (32, 16)
        assert shapes["model.layers.2.mlp.down_proj.weight"] == (32, 24)
        assert shapes["model.norm.weight"] == (32,)
        assert (logits - wanted).abs().max() < 1e-12 * wanted.abs().max()
        assert text.equal(written)
