"""A cloud with a fake model on a free port, devices for it, and a client that says what it likes."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
from websockets.asyncio.client import connect

from spa_jax.channel import DeviceConfig
from spa_jax.cloud import Cloud, CloudConfig
from spa_jax.device import Device
from spa_jax.wire import FROM_CLOUD, Prefill, Welcome, decode, encode
from tests.spa.fake_models import FakeCloud, FakeDevice, hello

TOKEN = "a-token-that-is-long-enough"
PROMPT = [5, 9, 11, 30]
NONE = np.array([], np.int32)
QUICK = DeviceConfig(connect_s=10, reply_s=20, backoff_s=0.01)


@asynccontextmanager
async def serving(model=None, *, token=TOKEN, **config):
    async with Cloud(model or FakeCloud(), CloudConfig(port=0, **config), token=token) as cloud:
        yield cloud


def run(body):
    """A test of at most twenty seconds."""
    return asyncio.run(asyncio.wait_for(body(), 20))


def device(cloud, model=None, config=QUICK, token=TOKEN, **kwargs):
    return Device(getattr(cloud, "url", cloud), model or FakeDevice(), token=token, config=config, **kwargs)


async def write(url, model=None, limit=30, stop=(), **kwargs):
    async with device(url, model, **kwargs) as one:
        return await one.generate(PROMPT, limit, stop)


async def released(cloud):
    """Once every session is gone."""
    for _ in range(200):
        if len(cloud.slots.free) == cloud.model.slots:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"slots are lost: {cloud.slots.free} of {cloud.model.slots} are free")


class Liar:
    """A client that says what it likes."""

    def __init__(self, cloud, **terms):
        self.url, self.terms = cloud.url, hello(**terms)

    async def __aenter__(self):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.connection = await connect(self.url, additional_headers=headers, compression=None, proxy=None)
        return self

    async def __aexit__(self, *_):
        self.connection.transport.abort()

    async def say(self, message):
        await self.connection.send(message if isinstance(message, bytes | str) else encode(message))

    async def hear(self):
        return decode(await asyncio.wait_for(self.connection.recv(), 5), FROM_CLOUD)

    async def begin(self, **changes):
        await self.say(self.terms)
        assert isinstance(await self.hear(), Welcome)
        await self.say(Prefill(np.array(PROMPT), 30, NONE))

    async def until(self, kind):
        while not isinstance(message := await self.hear(), kind):
            pass
        return message


def check_no_weights(captured: list, weights: list[np.ndarray]) -> None:
    """None of the rows of any weight is in what was sent, in any of the precisions that travel."""
    sent = b"".join(data for _, data in captured)
    for weight in weights:
        for row in weight.reshape(-1, weight.shape[-1]):
            for cast in (np.float32, np.float16):
                assert row[:4].astype(cast).tobytes() not in sent
