//! The rules of the generated CustomResourceDefinition, run here: the same
//! schema, the same CEL, the same messages as an apiserver gives.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use cel::common::types::{CelBool, CelInt, CelString, INT_TYPE, STRING_TYPE};
use cel::common::value::CowVal;
use cel::objects::Key;
use cel::{Context, Env, ExecutionError, Program};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool, ValidationRule,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::schema::{OptionalEnum, OptionalIntOrString, StructuralSchemaRewriter};
use schemars::generate::SchemaSettings;
use schemars::transform::AddNullable;
use serde_json::Value;

use crate::error::{Error, Problem};
use crate::keyspace::{Keyspace, json};
use crate::schema::Walk;
use crate::units::size_bytes;

/// Whether a Keyspace may be created (`old` is none) or may become this from what it was. Refused
/// by the schema and the CEL rules of the CustomResourceDefinition, in their words.
pub fn check(keyspace: &Keyspace, old: Option<&Keyspace>) -> Result<(), Error> {
    let bare = |k: &Keyspace| {
        let mut value = json(k);
        // A status is the operator's own, and not under these rules.
        if let Some(object) = value.as_object_mut() {
            object.remove("status");
        }
        value
    };
    let problems = validate(&mut bare(keyspace), old.map(bare).as_ref());
    let name = keyspace.metadata.name.clone();
    let placed = problems.into_iter().map(|p| Problem { keyspace: name.clone(), ..p }).collect();
    Error::unless_empty(placed)
}

/// Fills in the defaults of a Keyspace in JSON, and says what is wrong with it.
pub(crate) fn validate(value: &mut Value, old: Option<&Value>) -> Vec<Problem> {
    match &*RULES {
        Ok(rules) => {
            crate::schema::fill(&rules.root, value);
            Walk::new(rules).run(value, old)
        }
        // Never so: a test loads them.
        Err(error) => {
            vec![Problem { found: "can't be checked".to_owned(), wanted: error.clone(), ..Problem::default() }]
        }
    }
}

/// The schema of a whole Keyspace document, and its CEL rules, compiled.
pub(crate) struct Rules {
    pub(crate) root: JSONSchemaProps,
    programs: BTreeMap<String, Program>,
    env: Arc<Env>,
}

pub(crate) static RULES: LazyLock<Result<Rules, String>> = LazyLock::new(Rules::load);

impl Rules {
    fn load() -> Result<Self, String> {
        let mut root = crate::crd()
            .spec
            .versions
            .into_iter()
            .find_map(|v| v.schema.and_then(|s| s.open_api_v3_schema))
            .ok_or("the CustomResourceDefinition has no schema")?;
        // An apiserver checks these itself; no CustomResourceDefinition may.
        let properties = root.properties.get_or_insert_default();
        properties.insert("metadata".to_owned(), metadata()?);
        for key in ["apiVersion", "kind"] {
            let schema = JSONSchemaProps { type_: Some("string".to_owned()), ..JSONSchemaProps::default() };
            properties.insert(key.to_owned(), schema);
        }
        root.required.get_or_insert_default().push("metadata".to_owned());

        let env = Arc::new(library().map_err(|e| e.to_string())?);
        let mut programs = BTreeMap::new();
        for rule in all_rules(&root) {
            for source in [Some(&rule.rule), rule.message_expression.as_ref()].into_iter().flatten() {
                let program = env.compile(source).map_err(|e| format!("the rule {source} is not CEL: {e}"))?;
                programs.insert(source.clone(), program);
            }
        }
        Ok(Self { root, programs, env })
    }

    /// The message of a rule that this value (which was `old`) breaks.
    pub(crate) fn broken(&self, rule: &ValidationRule, value: &Value, old: Option<&Value>) -> Option<String> {
        let Some(program) = self.programs.get(&rule.rule) else {
            return Some(format!("can't be checked: the rule {} is unknown", rule.rule));
        };
        // A rule about change holds where there was something before.
        if old.is_none() && program.references().has_variable("oldSelf") {
            return None;
        }
        let mut context = Context::with_env(self.env.clone());
        context.add_variable_from_value("self", to_cel(value));
        if let Some(old) = old {
            context.add_variable_from_value("oldSelf", to_cel(old));
        }
        match program.execute(&context) {
            Ok(cel::Value::Bool(true)) => None,
            Ok(cel::Value::Bool(false)) => {
                let said = rule.message_expression.as_ref().and_then(|source| {
                    match self.programs.get(source)?.execute(&context) {
                        Ok(cel::Value::String(text)) => Some(text.to_string()),
                        _ => None,
                    }
                });
                Some(said.or_else(|| rule.message.clone()).unwrap_or_else(|| format!("failed rule: {}", rule.rule)))
            }
            other => Some(format!("can't be checked: the rule {} gave {other:?}", rule.rule)),
        }
    }
}

/// Every rule of a schema.
fn all_rules(schema: &JSONSchemaProps) -> Vec<ValidationRule> {
    let mut rules = schema.x_kubernetes_validations.clone().unwrap_or_default();
    rules.extend(schema.properties.iter().flat_map(|p| p.values()).flat_map(all_rules));
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        rules.extend(all_rules(items));
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        rules.extend(all_rules(values));
    }
    rules
}

/// The schema of metadata, of which a name is required.
fn metadata() -> Result<JSONSchemaProps, String> {
    let generator = SchemaSettings::openapi3()
        .with(|s| {
            s.inline_subschemas = true;
            s.meta_schema = None;
        })
        .with_transform(AddNullable::default())
        .with_transform(StructuralSchemaRewriter)
        .with_transform(OptionalEnum)
        .with_transform(OptionalIntOrString)
        .into_generator();
    let schema = generator.into_root_schema_for::<ObjectMeta>();
    let mut schema: JSONSchemaProps = serde_json::to_value(schema)
        .and_then(serde_json::from_value)
        .map_err(|e| format!("the schema of metadata can't be read: {e}"))?;
    crate::crd::tidy(&mut schema);
    schema.required = Some(vec!["name".to_owned()]);
    Ok(schema)
}

/// Plain CEL, and the few functions of Kubernetes's own library that the rules use.
fn library() -> Result<Env, cel::DeclarationError> {
    fn text<'a>(args: &'a [CowVal<'_, '_>], at: usize) -> Option<&'a str> {
        args.get(at)?.downcast_ref::<CelString<'_>>().map(CelString::inner)
    }
    fn number(args: &[CowVal<'_, '_>], at: usize) -> Option<i64> {
        args.get(at)?.downcast_ref::<CelInt>().map(|n| *n.inner())
    }
    let mut env = Env::stdlib();
    // A quantity is its number of bytes here: the rules ask for no more.
    env.add_overload("isQuantity", "is_quantity_string", vec![STRING_TYPE], |args| {
        Ok(CowVal::owned(CelBool::from(text(&args, 0).and_then(size_bytes).is_some())))
    })?;
    env.add_overload("quantity", "string_to_quantity", vec![STRING_TYPE], |args| {
        let bytes = text(&args, 0).and_then(size_bytes).and_then(|b| i64::try_from(b).ok());
        let bytes = bytes.ok_or_else(|| ExecutionError::function_error("quantity", "not a quantity"))?;
        Ok(CowVal::owned(CelInt::from(bytes)))
    })?;
    env.add_member_overload("compareTo", "quantity_compare_to", INT_TYPE, vec![INT_TYPE], |args| {
        Ok(CowVal::owned(CelInt::from(number(&args, 0).cmp(&number(&args, 1)) as i64)))
    })?;
    Ok(env)
}

/// As an apiserver hands it to CEL: whole numbers are ints.
fn to_cel(value: &Value) -> cel::Value {
    match value {
        Value::Null => cel::Value::Null,
        Value::Bool(b) => cel::Value::Bool(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => cel::Value::Int(n),
            (_, Some(n)) => cel::Value::UInt(n),
            _ => cel::Value::Float(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(s) => cel::Value::String(Arc::new(s.clone())),
        Value::Array(items) => cel::Value::List(Arc::new(items.iter().map(to_cel).collect())),
        Value::Object(object) => {
            let map: HashMap<Key, cel::Value> =
                object.iter().map(|(k, v)| (Key::String(Arc::new(k.clone())), to_cel(v))).collect();
            cel::Value::Map(map.into())
        }
    }
}
