from concurrent.futures import ThreadPoolExecutor

from lightning_odem.stream.claim import make_next_version


def test_streams_started_at_the_same_time_get_different_directories(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda _: make_next_version(tmp_path / "runs"), range(64)))
    assert sorted(path.name for path in paths) == sorted(f"version_{number}" for number in range(64))
