from export.member import Member
from tests.export.conftest import Train
from training import checkpoint


def test_commit_of_a_member_is_of_all_that_trained_it(train: Train) -> None:
    state = checkpoint.load(train("A1"))
    (own,) = state.sessions
    sessions = [{**own, "commit": "abc"}, {**own, "commit": "def"}]
    member = Member(state.model_copy(update={"sessions": sessions}), "0" * 64, state.parsed_recipe())
    assert member.facts()["commit"] == "abc + def"
