"""A cloud on a mesh says what it says on one device. Run by test_split_runtime in a process with two CPU devices."""

import numpy as np

from mlfs_jax.sharding import make_mesh
from spa_jax.cloud_model import DecoderCloud
from tests.mlfs.tiny import tiny_decoder
from tests.spa.fake_models import hello


def conversation(mesh):
    model = tiny_decoder("llama")
    cloud = DecoderCloud(model, slots=2, context=16, chunk=4, mesh=mesh)
    gate = np.random.default_rng(0).normal(size=(25, 2)).astype(np.float32)
    reads = []
    for slot in (0, 1):
        cloud.open(slot, hello(model=cloud.fingerprint, taps=np.array([0, 2]), gate=gate))
        reads.append(cloud.extend(slot, [5, 9, 11]))
    for _ in range(3):
        reads += cloud.step([0, 1], [read.token for read in reads[-2:]])
    tokens = cloud.finish([1], np.ones((1, 24), np.float32))
    return [(read.token, read.gate, read.taps, read.hidden) for read in reads], tokens, cloud


def main():
    one, two = conversation(None), conversation(make_mesh("tensor=2"))
    assert len(two[2]._cache.k.sharding.device_set) == 2 and not two[2]._cache.k.sharding.is_fully_replicated
    assert one[1] == two[1]
    for mine, theirs in zip(one[0], two[0], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    print("the same")


if __name__ == "__main__":
    main()
