"""Train the BitNet demo model: `train.py` with the architecture of `bitnet.py`.

    python train_bitnet.py --text books.txt --heldout other.txt --work run --export demo-bitnet-f32
    python -m mlx_delta.convert demo-bitnet-f32 -o demo-bitnet --embed-bits 6 --ternary packed

All of `train.py`'s arguments apply. A folder `--work` with the tokenizer and the tokens of the
Llama demo (tokenizer*.json, tokens.npy, heldout.npy) is taken as it is, so that both speak alike.
"""

from __future__ import annotations

import train
from bitnet import BitNet, BitNetConfig, save_bitnet

if __name__ == "__main__":
    # train.py builds, describes and writes its model by these names.
    train.Llama, train.ModelConfig, train.save_model = BitNet, BitNetConfig, save_bitnet
    train.main()
