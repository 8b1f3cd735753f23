"""The CIFAR ResNet (He et al., 2016, section 4.2): a backbone of one's own for ``TaskClassifier``.

Anything that maps images [B, C, H, W] to features [B, D] is a backbone. ``num_features`` tells ``TaskClassifier`` the
size D, ``pretrained_cfg`` (timm's convention) the mean and standard deviation its inputs are normalised with. In YAML:

    model:
      class_path: lightning_odem.classifiers.classifier.TaskClassifier
      init_args:
        backbone:
          class_path: examples.cifar_resnet.CifarResNet
          init_args: {depth: 20}
        checkpoint: resnet20_cifar10.safetensors
"""

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        added = out.shape[1] - x.shape[1]  # 0, or half of the planes: the new ones see zeros
        return relu(out + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added // 2, added // 2)))


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images; features [B, 64] from images [B, 3, H, W].

    Args:
        depth: Number of weighted layers, 6 n + 2: 20, 32, 44, 56, 110.
    """

    num_features = 64
    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6 n + 2 layers, for example 20, 32, 44, 56 or 110.")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, 1, depth // 6)
        self.layer2 = self._layer(16, 32, 2, depth // 6)
        self.layer3 = self._layer(32, 64, 2, depth // 6)

    @staticmethod
    def _layer(channels: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(channels, planes, stride), *(Block(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
