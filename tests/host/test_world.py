"""What launchers say in the environment, and what is refused in it."""

import pytest

from uft_ds.errors import UserError
from uft_ds.host.world import LauncherEnvironment, check_launched, given_port, launcher_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_torchruns_variables_are_read() -> None:
    """Each field comes from the variable that torchrun sets for it."""
    assert launcher_environment(TORCHRUN) == LauncherEnvironment(5, 16, 1, 4, "node0", 29400, 2)


def test_a_process_without_a_launcher_is_alone() -> None:
    """Without variables the process is rank 0 of 1, and how many ranks a node has is not known."""
    assert launcher_environment({}) == LauncherEnvironment()
    assert launcher_environment({}).ranks_per_node is None


def test_the_launcher_says_how_many_ranks_a_node_has() -> None:
    """torchrun's variable counts before DeepSpeed's; an empty one is as good as none."""
    assert launcher_environment({"LOCAL_SIZE": "4"}).ranks_per_node == 4
    assert launcher_environment({"LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": "8"}).ranks_per_node == 8
    assert launcher_environment({"LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": ""}).ranks_per_node == 4


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["²", pytest.param("9" * 5000, id="digits"), "first", "-1", "1.5"])
def test_a_variable_that_is_no_number_is_refused_by_name(name: str, value: str) -> None:
    """The message names the variable and what was found in it."""
    with pytest.raises(UserError, match=f"{name}: found '{value}'"):
        launcher_environment({name: value})


@pytest.mark.parametrize("value", ["0", "65536"])
def test_a_port_lies_between_1_and_65535(value: str) -> None:
    """A number that is no port is refused, too."""
    with pytest.raises(UserError, match="MASTER_PORT"):
        given_port({"MASTER_PORT": value})


def test_a_process_that_no_launcher_started_is_refused() -> None:
    """All missing variables are named at once."""
    check_launched(TORCHRUN)
    with pytest.raises(UserError, match="WORLD_SIZE, MASTER_PORT not set"):
        check_launched({"RANK": "0", "LOCAL_RANK": "0"})
