import pytest
import torch
from torch import nn

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.checkpoints.roles import Roles
from lightning_softprompt.methods import PromptTuning


class Root(nn.Module):
    def __init__(self, roles):
        super().__init__()
        self.roles = roles


@pytest.fixture
def backbone(load):
    return load("llama")


@pytest.fixture
def root(backbone):
    roles = Roles({name: PromptTuning(length=3, backbone=backbone.spec) for name in ("policy", "reference")})
    roles.attach(backbone, [4, 9])
    return Root(roles)


def test_roles_share_the_backbone_and_have_their_own_seeds(root, backbone):
    policy, reference = root.roles.methods
    assert policy.loaded is reference.loaded is backbone
    assert not torch.equal(policy.tokens, reference.tokens)
    alone = PromptTuning(length=3, backbone=backbone.spec)
    alone.attach(backbone, 9)
    assert torch.equal(root.roles["reference"].tokens, alone.tokens)


def test_the_state_dict_has_each_role_by_its_name_without_the_backbone(root):
    assert set(root.state_dict()) == {"roles.policy.tokens", "roles.reference.tokens"}


def test_loading_requires_each_role_but_not_the_backbone(root):
    state = {name: torch.zeros_like(tensor) for name, tensor in root.state_dict().items()}
    root.load_state_dict(state)
    assert not root.roles["policy"].tokens.any()
    del state["roles.reference.tokens"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"roles\.reference\.tokens\"\. *$"):
        root.load_state_dict(state)


@pytest.mark.parametrize("trains", [True, False])
def test_a_role_of_a_file_is_frozen_if_it_does_not_train(backbone, tmp_path, trains):
    method = PromptTuning(length=3, backbone=backbone.spec)
    method.attach(backbone, 1)
    path = tmp_path / "prompt.safetensors"
    write_prompt(path, SavedPrompt({"tokens": method.tokens.detach()}, backbone_identity(backbone), method.hparams))
    roles = Roles()
    saved = roles.load("teacher", path, backbone, trains)
    assert list(roles) == ["teacher"]
    assert torch.equal(roles["teacher"].tokens, saved.tensors["tokens"])
    assert roles["teacher"].tokens.requires_grad is trains
