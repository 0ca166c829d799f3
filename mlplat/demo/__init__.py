"""The demo: a digit classifier, trained by a pipeline on data that scikit-learn brings along."""
