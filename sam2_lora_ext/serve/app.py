"""The page's HTTP requests and responses, in JSON; images are PNG. Runs are flat lists: start, length, start, ...

GET    /  /page.css  /*.js           the page
GET    /api/state                    images, models, classes, formats
GET    /api/images/N                 an image as 8-bit PNG
POST   /api/images?name=             adds an image (the body is the file)
POST   /api/images/N/open            returns its kept masks; encodes it if the models see whole strips
POST   /api/predict                  masks of clicks or a box, one for each requested model
POST   /api/classes                  masks of the class prompts of a model
POST   /api/keep                     keeps a mask, or all masks of the class prompts
DELETE /api/images/N/masks/M         removes a kept mask
POST   /api/images/N/clean           marks a strip as clean, or removes that mark
POST   /api/save                     writes the kept masks as a data set
"""

import io
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from sam2_lora_ext.data.writers import WRITERS
from sam2_lora_ext.serve.classes import ClassPages
from sam2_lora_ext.serve.engine import MOST_CLICKS, Engine, Prompts
from sam2_lora_ext.serve.guards import LOCAL, Guard
from sam2_lora_ext.serve.images import LARGEST_UPLOAD
from sam2_lora_ext.serve.labels import Kept, Labels
from sam2_lora_ext.utils.errors import UserError, system_sentence

FILES = {  # path -> file in the folder `page`, and its media type
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
}
Number = Annotated[float, Field(allow_inf_nan=False)]
Click = tuple[Number, Number, Annotated[int, Field(ge=0, le=1)]]


class PromptRequest(BaseModel):
    """The prompts of a request on an image."""

    model_config = ConfigDict(extra="forbid")
    image: int
    clicks: Annotated[list[Click], Field(max_length=MOST_CLICKS)] = []
    box: tuple[Number, Number, Number, Number] | None = None
    whole: bool = False

    def prompts(self) -> Prompts:
        return Prompts(tuple(self.clicks), self.box, self.whole)


class Predict(PromptRequest):
    models: Annotated[list[str], Field(min_length=1, max_length=2)]


class Keep(PromptRequest):
    model: str
    class_id: int | None = None  # None: keep the masks of the class prompts


class Classes(BaseModel):
    model_config = ConfigDict(extra="forbid")
    image: int
    model: str


class Clean(BaseModel):
    model_config = ConfigDict(extra="forbid")
    clean: bool


class Save(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: str
    name: str


def create_app(engine: Engine, labels: Labels, classes: ClassPages, hosts: frozenset[str] = frozenset(LOCAL)) -> Guard:
    """The guarded application.

    Args:
        engine: predicts masks of clicks and boxes.
        labels: stores kept masks.
        classes: predicts masks of class prompts.
        hosts: host names under which the page is served.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its documentation page loads from other hosts
    images = engine.images
    page = resources.files("sam2_lora_ext.serve") / "page"

    def file(name: str, kind: str) -> Any:
        content = (page / name).read_bytes()
        return lambda: Response(content, media_type=kind)

    for path, entry in FILES.items():
        app.get(path)(file(*entry))

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return {
            "images": images.names(),
            "models": [{"name": name, "class_prompts": name in classes.makers} for name in engine.models],
            "classes": [{"id": number, "name": name} for number, name in sorted(labels.class_names.items())],
            "formats": list(WRITERS),
            "windows": engine.crop,
            "out": str(labels.out),
            "largest_upload": LARGEST_UPLOAD,
            **counts(),
        }

    def counts() -> dict[str, Any]:
        strips, masks = labels.count()
        return {"labelled": strips, "masks": masks, "unsaved": labels.unsaved}

    def kept(image: int) -> dict[str, Any]:
        masks, clean = labels.of(image)
        return {"kept": [shown(one) for one in masks], "clean": clean, **counts()}

    @app.get("/api/images/{image}")
    def picture(image: int) -> Response:
        buffer = io.BytesIO()
        Image.fromarray(images.read(image)).save(buffer, format="PNG", compress_level=1)
        return Response(buffer.getvalue(), media_type="image/png")

    @app.post("/api/images")
    async def drop(request: Request, name: str) -> dict[str, Any]:
        content = b"".join([piece async for piece in request.stream()])
        image = await run_in_threadpool(images.add, name, content)
        return {"image": image, "images": images.names()}

    @app.post("/api/images/{image}/open")
    def open_image(image: int, models: Annotated[list[str], Field(max_length=2)]) -> dict[str, Any]:
        height, width = images.read(image).shape[:2]
        encoded = [engine.encode(image, name) for name in models]
        return {"height": height, "width": width, "encode_ms": sum(encoded), **kept(image)}

    @app.post("/api/predict")
    def predict(body: Predict) -> dict[str, Any]:
        answers = [engine.answer(body.image, name, body.prompts()) for name in body.models]
        return {
            "answers": [
                {
                    "model": name,
                    "runs": answer.runs.ravel().tolist(),
                    "area": answer.area,
                    "score": answer.score,
                    "window": answer.window,
                    "encode_ms": answer.encode_ms,
                    "decode_ms": answer.decode_ms,
                }
                for name, answer in zip(body.models, answers, strict=True)
            ]
        }

    @app.post("/api/classes")
    def class_masks(body: Classes) -> dict[str, Any]:
        return {
            "model": body.model,
            "found": [
                {"class_id": one.class_id, "score": one.score, "parts": [part.ravel().tolist() for part in one.parts]}
                for one in classes.inspect(body.image, body.model)
            ],
        }

    @app.post("/api/keep")
    def keep(body: Keep) -> dict[str, Any]:
        if body.class_id is not None:
            answer = engine.answer(body.image, body.model, body.prompts())
            labels.keep(body.image, body.class_id, answer.runs, body.model)
        else:
            for one in classes.inspect(body.image, body.model):
                for part in one.parts:
                    labels.keep(body.image, one.class_id, part, body.model)
        return kept(body.image)

    @app.delete("/api/images/{image}/masks/{number}")
    def drop_mask(image: int, number: int) -> dict[str, Any]:
        labels.drop(image, number)
        return kept(image)

    @app.post("/api/images/{image}/clean")
    def mark_clean(image: int, body: Clean) -> dict[str, Any]:
        labels.mark_clean(image, body.clean)
        return kept(image)

    @app.post("/api/save")
    def save(body: Save) -> dict[str, Any]:
        folder, note = labels.save(body.format, body.name)
        return {"folder": str(folder), "note": note, **counts()}

    add_error_handlers(app)
    return Guard(app, hosts, {"/api/images": LARGEST_UPLOAD})


def shown(one: Kept) -> dict[str, Any]:
    """A kept mask as JSON values for the page."""
    area = int(one.runs[:, 1].sum())
    return {
        "number": one.number,
        "class_id": one.class_id,
        "runs": one.runs.ravel().tolist(),
        "area": area,
        "model": one.model,
    }


def add_error_handlers(app: FastAPI) -> None:
    """Turns every failure into one sentence in `detail`: 400 user error, 422 malformed request, 500 server error."""

    def answer(status: int, sentence: str) -> JSONResponse:
        return JSONResponse({"detail": sentence[:2000].encode("utf-8", "replace").decode()}, status)

    @app.exception_handler(UserError)
    def mistake(request: Request, error: UserError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(RequestValidationError)
    def form(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def known(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    for kind in (OSError, MemoryError):

        @app.exception_handler(kind)
        def system(request: Request, error: Exception) -> JSONResponse:
            return answer(500, system_sentence(error) or f"the operating system reported an error: {error}")

    @app.exception_handler(Exception)
    def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"the server failed ({type(error).__name__}): see its output in the terminal")
