"""What a soup is made of, in names and numbers: the recipe, checked; what it comes to; what is told of the soup."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.recipe.findings import (
        Finding as Finding,
        ingredients_set_apart as ingredients_set_apart,
        with_allowed as with_allowed,
    )
    from hf_soup.recipe.mixture import (
        DEPTH as DEPTH,
        LINEAR as LINEAR,
        MethodCall as MethodCall,
        Mixture as Mixture,
        grid as grid,
        is_average as is_average,
        methods_of as methods_of,
        needs_base as needs_base,
        searched as searched,
        settled as settled,
        with_method_of_selection as with_method_of_selection,
    )
    from hf_soup.recipe.schema import (
        JUDGEMENTS as JUDGEMENTS,
        MAX_BYTES as MAX_BYTES,
        MAX_INGREDIENTS as MAX_INGREDIENTS,
        TASKS as TASKS,
        AnyScoring as AnyScoring,
        CalibrationData as CalibrationData,
        FunctionScoring as FunctionScoring,
        HarnessScoring as HarnessScoring,
        Ingredient as Ingredient,
        Models as Models,
        Named as Named,
        Override as Override,
        Recipe as Recipe,
        Scoring as Scoring,
        as_recipe as as_recipe,
        is_local_path as is_local_path,
        parse_part as parse_part,
        renamed as renamed,
        split_revision as split_revision,
        task_names as task_names,
        with_dataset as with_dataset,
    )
    from hf_soup.recipe.soup_report import (
        OTHER_MODELS as OTHER_MODELS,
        AdapterReport as AdapterReport,
        BatchNormUpdate as BatchNormUpdate,
        CalibrationErrors as CalibrationErrors,
        Comparison as Comparison,
        CurvePoint as CurvePoint,
        Diversity as Diversity,
        LearningEpoch as LearningEpoch,
        ReportedData as ReportedData,
        ReportedLineage as ReportedLineage,
        ReportedOverride as ReportedOverride,
        Score as Score,
        SelectionStability as SelectionStability,
        SoupReport as SoupReport,
        UpdateReport as UpdateReport,
    )
    from hf_soup.recipe.validation import (
        MAX_POINTS as MAX_POINTS,
        require_methods as require_methods,
        require_named as require_named,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
