"""Prompt templates of the usual tasks: those that OpenAI published with CLIP, as FusionBench selects them."""

DEFAULT_PROMPTS = ["a photo of a {}."]
"""Templates of tasks without an entry in ``PROMPTS``."""

_PHOTOS = ["a photo of a {}.", "a photo of the {}."]
_CIFAR = [
    f"a {photo} of {article} {size}{{}}."
    for article in ("a", "the")
    for photo, size in (
        ("photo", ""),
        *((f"{quality} photo", "") for quality in ("blurry", "black and white", "low contrast", "high contrast")),
        ("bad photo", ""),
        ("good photo", ""),
        ("photo", "small "),
        ("photo", "big "),
    )
]
_NUMBER = ['a photo of the number: "{}".']

PROMPTS: dict[str, list[str]] = {
    "sun397": _PHOTOS,
    "stanford-cars": [
        *_PHOTOS,
        "a photo of my {}.",
        "i love my {}!",
        *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
    ],
    "resisc45": [
        f"{view} {kind} of {article}{{}}."
        for article in ("", "a ", "the ")
        for kind in ("imagery", "photo", "view")
        for view in ("satellite", "aerial")
    ],
    "eurosat": [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")],
    "svhn": _NUMBER,
    "gtsrb": [f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")],
    "mnist": _NUMBER,
    "dtd": [
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ],
    "oxford_flowers102": ["a photo of a {}, a type of flower."],
    "pcam": ["this is a photo of {}"],
    "fer2013": [
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ],
    "oxford-iiit-pet": ["a photo of a {}, a type of pet."],
    "stl10": _PHOTOS,
    "cifar100": _CIFAR,
    "cifar10": _CIFAR,
    "food101": ["a photo of {}, a type of food."],
    "fashion_mnist": _PHOTOS,
    "emnist_letters": ['a photo of the digit character: "{}".'],
    "kmnist": ["a photo of the character {}."],
    "rendered-sst2": ["a {} review of a movie."],
}
"""Prompt templates by task, with ``{}`` in the place of the class name."""
