from vimfast.config import AugmentConfig as AugmentConfig
from vimfast.data.loader import Loader as Loader
from vimfast.data.loader import LoaderSettings as LoaderSettings
from vimfast.data.opening import evaluation_loader as evaluation_loader
from vimfast.data.opening import training_loader as training_loader
from vimfast.data.order import Order as Order
from vimfast.data.source import open_source as open_source
from vimfast.data.views import Batch as Batch
from vimfast.data.views import Evaluation as Evaluation
from vimfast.data.views import training_view as training_view
from vimfast.errors import UserError as UserError
from vimfast.inference import embed as embed
from vimfast.inference import load_classifier as load_classifier
from vimfast.inference import predict as predict
from vimfast.models import create_model as create_model

__version__: str
