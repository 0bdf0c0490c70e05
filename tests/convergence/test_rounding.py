"""What 16 bits cost a young adapter on real weights: rounding base and adapter once, or the base first."""

import pytest
import torch

from deepdoctor.data.prompt import EncodedRow, Prompt
from deepdoctor.data.sources import load_rows
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.recipe import DataSection, TrainSection
from deepdoctor.train.loop import train
from helpers_stock import exact_products, farthest, shown, stock_curve
from helpers_train import losses, new_adapter

SECTION = TrainSection(
    lora_rank=16,
    lora_alpha=16,
    global_batch_size=8,
    max_steps=8,
    learning_rate=4e-4,
    schedule="linear",
    warmup_steps=1,
    shuffle=False,
    save_steps=0,
)
TOKENS = 96


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_rounds_with_its_base(smollm2, tmp_path):
    """In bf16 our curve keeps to fp32; the same products, rounded before the adapter is added, do not.

    Eight rows of 96 tokens a step, sixteen rows; every token is trained. With -s the curves are printed.
    """
    prompt = Prompt(load_tokenizer(smollm2), "tutorial", train_on="all")
    rows = [prompt.encode_row(row) for row in load_rows(DataSection(source="embedded:rows"))]
    cut = [row.input_ids[60 : 60 + TOKENS] for row in rows if len(row.input_ids) >= 60 + TOKENS][:16]
    rows = [EncodedRow(ids, [IGNORE_INDEX, *ids[1:]], (1, 1), (1, TOKENS)) for ids in cut]
    new_adapter(load_decoder(smollm2, "fp32"), SECTION).save(tmp_path / "start", str(smollm2))
    exact = stock_curve(smollm2, tmp_path / "start", rows, SECTION, torch.float32, "cpu")
    curves = []
    for roundings in (1, 2):
        with exact_products(roundings):
            curves.append(stock_curve(smollm2, tmp_path / "start", rows, SECTION, torch.bfloat16, "cpu"))
    decoder = load_decoder(smollm2, "bf16")
    adapter = new_adapter(decoder, SECTION)
    mine = losses(train(decoder, adapter, rows, SECTION, seed=7, folder=tmp_path / "ours", token_budget=8 * TOKENS))
    once, twice, ours = (farthest(curve, exact) for curve in (*curves, mine))
    print(f"from fp32: rounded once {once:.4f}, twice {twice:.4f}, ours {ours:.4f}; these and fp32:")
    print(shown(*curves, mine, exact))
    assert once < twice / 4
    assert ours < twice / 2
