"""Tell malignant from benign tumours by a table of 30 measurements (Wisconsin breast cancer, 569 rows).

A scikit-learn pipeline scales the columns of a DataFrame and trains nnx's MLPClassifier with early stopping. The
network is saved and exported to the folder; a second process, which knows nothing of the training, loads both files,
with nnx.models.load and with onnxruntime. It needs `pip install '.[tabular]'`.
"""

import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import nnx
from nnx.sklearn import MLPClassifier


def load():
    """Return measurements and diagnoses, for training and held out, as a DataFrame and a Series of strings."""
    x, t = load_breast_cancer(return_X_y=True, as_frame=True)
    return train_test_split(x, t.map({0: "malignant", 1: "benign"}), stratify=t, random_state=0)


def train(x, t, epochs):
    """Return a pipeline trained on x and t."""
    classifier = MLPClassifier((64, 32), batch_size=32, early_stopping=True, max_iter=epochs, random_state=0)
    return make_pipeline(StandardScaler(), classifier).fit(x, t)


def save(pipeline, x, folder):
    """Save the network, its ONNX export, the curves, and the scaled rows x that the second process predicts."""
    folder.mkdir(parents=True, exist_ok=True)
    scaler, classifier = pipeline
    nnx.checkpoint.save(folder / "net.safetensors", classifier.model_)
    nnx.onnx.export(classifier.model_, folder / "net.onnx")
    classifier.trainer_.plot(path=folder / "history.png")
    numpy.save(folder / "rows.npy", scaler.transform(x).astype("float32"))


def serve(folder):
    """Predict the rows in the folder by both files, and save the probabilities of the second class."""
    import onnxruntime  # noqa: PLC0415 - only needed here

    rows = numpy.load(folder / "rows.npy")
    probabilities = nnx.to_cpu(nnx.models.load(folder / "net.safetensors").predict_proba(rows))
    (scores,) = onnxruntime.InferenceSession(folder / "net.onnx").run(None, {"x": rows})
    print(f"onnxruntime chooses the same class in {(scores.argmax(1) == probabilities.argmax(1)).sum()} rows")
    numpy.save(folder / "probabilities.npy", probabilities)


def main(epochs=200, folder="tabular"):
    """Return the held-out accuracy of the second process."""
    folder = Path(folder)
    x, x_test, t, t_test = load()
    pipeline = train(x, t, epochs)
    classifier = pipeline[-1]
    print(f"{classifier.n_iter_} epochs, best held-out accuracy {max(classifier.validation_scores_):.3f}")
    save(pipeline, x_test, folder)
    subprocess.run([sys.executable, __file__, "--folder", folder, "--serve"], check=True)  # noqa: S603
    probabilities = numpy.load(folder / "probabilities.npy")
    accuracy = float((classifier.classes_[probabilities.argmax(axis=1)] == t_test).mean())
    print(f"accuracy {accuracy:.3f} on {len(t_test)} other tumours; files and curves are in {folder}")
    return accuracy


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--folder", help="where to save the files")
    parser.add_argument("--serve", action="store_true", help="predict the rows in the folder: the second process")
    options = vars(parser.parse_args())
    if options.pop("serve", False):
        serve(Path(options["folder"]))
    else:
        main(**options)
