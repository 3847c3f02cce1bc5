//! Walks a document along the structural schema: defaults, types, bounds,
//! unknown fields, and at each place the rules that stand there.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::Value;

use crate::error::Problem;
use crate::rules::Rules;

/// Fills in the schema's defaults. As on an apiserver, a null is an absent field.
pub(crate) fn fill(schema: &JSONSchemaProps, value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (name, property) in schema.properties.iter().flatten() {
                if object.get(name).is_some_and(Value::is_null) {
                    object.remove(name);
                }
                if !object.contains_key(name)
                    && let Some(default) = &property.default
                {
                    object.insert(name.clone(), default.0.clone());
                }
                if let Some(value) = object.get_mut(name) {
                    fill(property, value);
                }
            }
            if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
                object.values_mut().for_each(|v| fill(values, v));
            }
        }
        Value::Array(array) => {
            if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
                array.iter_mut().for_each(|v| fill(items, v));
            }
        }
        _ => {}
    }
}

/// One walk over one document.
pub(crate) struct Walk<'a> {
    rules: &'a Rules,
    problems: Vec<Problem>,
    // Wrong types, missing and unknown fields. Rules are asked only where there are none beneath:
    // they would trip over them.
    malformed: usize,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(rules: &'a Rules) -> Self {
        Self { rules, problems: Vec::new(), malformed: 0 }
    }

    /// What is wrong with the document, which was `old` before.
    pub(crate) fn run(mut self, document: &Value, old: Option<&Value>) -> Vec<Problem> {
        let rules = self.rules;
        self.node(&rules.root, "", document, old);
        self.problems
    }

    fn node(&mut self, schema: &JSONSchemaProps, path: &str, value: &Value, old: Option<&Value>) {
        let malformed = self.malformed;
        if !has_type(schema, value) {
            let noun = noun(value);
            let quotes = if schema.type_.as_deref() == Some("string") && value.is_number() {
                " (in quotes, to make it a string)"
            } else {
                ""
            };
            let wanted = format!("must be {}{quotes}", self.wanted(schema, path));
            return self.malformed(path, format!("is {}, {noun}", show(value)), wanted);
        }
        match value {
            Value::Object(object) => self.object(schema, path, object, old),
            Value::Array(array) => {
                if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
                    for (i, item) in array.iter().enumerate() {
                        // Items have no identity, so nothing says which one an item was before.
                        self.node(items, &format!("{path}[{i}]"), item, None);
                    }
                }
            }
            _ => {}
        }
        if self.malformed > malformed {
            return;
        }
        let before = self.problems.len();
        self.ask(schema, path, value, old);
        // A rule says more than a bare bound.
        if self.problems.len() == before && !within(schema, value) {
            let wanted = format!("must be {}", self.wanted(schema, path));
            self.problem(path, format!("is {}", show(value)), wanted);
        }
    }

    fn object(
        &mut self,
        schema: &JSONSchemaProps,
        path: &str,
        object: &serde_json::Map<String, Value>,
        old: Option<&Value>,
    ) {
        let none = BTreeMap::new();
        let properties = schema.properties.as_ref().unwrap_or(&none);
        for name in schema.required.iter().flatten().filter(|n| !object.contains_key(*n)) {
            let at = join(path, name);
            let wanted = properties.get(name).map_or_else(|| "a value".to_owned(), |p| self.wanted(p, &at));
            self.malformed(&at, "is missing".to_owned(), format!("must be {wanted}"));
        }
        for (name, value) in object {
            let at = join(path, name);
            let old = old.and_then(|o| o.get(name));
            if let Some(property) = properties.get(name) {
                self.node(property, &at, value, old);
            } else if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
                self.node(values, &at, value, old);
            } else if !properties.is_empty() && schema.x_kubernetes_preserve_unknown_fields != Some(true) {
                let hint = self.hint(properties, path, name);
                self.malformed(&at, "is not a field".to_owned(), hint);
            }
        }
    }

    /// Asks the rules that stand at this place.
    fn ask(&mut self, schema: &JSONSchemaProps, path: &str, value: &Value, old: Option<&Value>) {
        for rule in schema.x_kubernetes_validations.iter().flatten() {
            let Some(message) = self.rules.broken(rule, value, old) else { continue };
            // Rules on the whole document can name no field but in words: "metadata.name must be ...".
            let (field, wanted) = match rule.field_path.as_deref() {
                Some(field) => (field.trim_start_matches('.'), message.as_str()),
                None if path.is_empty() => message.split_once(' ').unwrap_or(("", &message)),
                None => ("", message.as_str()),
            };
            let found = field.split('.').filter(|s| !s.is_empty()).try_fold(value, |v, name| v.get(name));
            let found = found.map_or_else(|| "is unset".to_owned(), |v| format!("is {}", show(v)));
            self.problem(&join(path, field), found, wanted.to_owned());
        }
    }

    fn malformed(&mut self, field: &str, found: String, wanted: String) {
        self.malformed += 1;
        self.problem(field, found, wanted);
    }

    fn problem(&mut self, field: &str, found: String, wanted: String) {
        self.problems.push(Problem { field: field.to_owned(), found, wanted, ..Problem::default() });
    }

    /// What would be right at this place: the words of its rule if it has one.
    fn wanted(&self, schema: &JSONSchemaProps, path: &str) -> String {
        let (place, prefix) =
            if path == "metadata.name" { (&self.rules.root, "metadata.name must be ") } else { (schema, "must be ") };
        let words = place.x_kubernetes_validations.iter().flatten();
        if let Some(words) = words.filter_map(|r| r.message.as_deref()).find_map(|m| m.strip_prefix(prefix)) {
            return words.to_owned();
        }
        if let Some(choices) = &schema.enum_ {
            let choices: Vec<&str> = choices.iter().filter_map(|c| c.0.as_str()).collect();
            return choices.join(" or ");
        }
        if schema.x_kubernetes_int_or_string == Some(true) {
            return "a quantity such as 2, 500m or 4Gi".to_owned();
        }
        match schema.type_.as_deref() {
            Some("integer") => match (schema.minimum, schema.maximum) {
                (Some(low), Some(high)) => format!("a whole number from {low} to {high}"),
                (Some(low), None) => format!("a whole number from {low} up"),
                _ => "a whole number".to_owned(),
            },
            Some("number") => "a number".to_owned(),
            Some("string") => match schema.max_length {
                Some(most) => format!("a string of at most {most} characters"),
                None => "a string".to_owned(),
            },
            Some("boolean") => "true or false".to_owned(),
            Some("array") => "a list".to_owned(),
            _ => match (&schema.required, &schema.properties) {
                (Some(least), _) => format!("a mapping with at least {}", list(least.iter())),
                (_, Some(known)) => format!("a mapping with {}", list(known.keys())),
                _ => "a mapping".to_owned(),
            },
        }
    }

    /// What was meant by a field that isn't one.
    fn hint(&self, here: &BTreeMap<String, JSONSchemaProps>, path: &str, name: &str) -> String {
        let near = here.keys().map(|known| (distance(&plain(known), &plain(name)), known)).min();
        let near = |most: usize| near.filter(|(distance, _)| *distance <= most).map(|(_, known)| known);
        // One slip is a slip; with more, a name that is right elsewhere is the better guess.
        if let Some(known) = near(1) {
            return format!("did you mean {known}?");
        }
        if let Some(elsewhere) = self.elsewhere(name) {
            return format!("it belongs at {elsewhere}");
        }
        if let Some(known) = near(1 + name.len() / 4) {
            return format!("did you mean {known}?");
        }
        let place = if path.is_empty() { "a Keyspace" } else { path };
        format!("{place} has {}", list(here.keys()))
    }

    /// Where under spec or metadata a field of this name stands.
    fn elsewhere(&self, name: &str) -> Option<String> {
        let top = self.rules.root.properties.as_ref()?;
        let spec = top.get("spec")?.properties.as_ref()?;
        if spec.contains_key(name) {
            return Some(format!("spec.{name}"));
        }
        let inner = spec.iter().find(|(_, p)| p.properties.as_ref().is_some_and(|p| p.contains_key(name)));
        if let Some((part, _)) = inner {
            return Some(format!("spec.{part}.{name}"));
        }
        top.get("metadata")?.properties.as_ref()?.contains_key(name).then(|| format!("metadata.{name}"))
    }
}

fn has_type(schema: &JSONSchemaProps, value: &Value) -> bool {
    if schema.x_kubernetes_int_or_string == Some(true) {
        return value.is_i64() || value.is_string();
    }
    match schema.type_.as_deref() {
        Some("integer") => value.is_i64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => true,
    }
}

/// The bounds that the schema has (a test sees to it that it has no others).
fn within(schema: &JSONSchemaProps, value: &Value) -> bool {
    let number = value.as_f64();
    let above = |least: f64| number.is_none_or(|n| n >= least);
    let below = |most: f64| number.is_none_or(|n| n <= most);
    let short = |most: i64| value.as_str().is_none_or(|s| s.chars().count() as i64 <= most);
    schema.minimum.is_none_or(above)
        && schema.maximum.is_none_or(below)
        && schema.max_length.is_none_or(short)
        && schema.enum_.as_ref().is_none_or(|choices| choices.iter().any(|c| c.0 == *value))
}

fn join(path: &str, name: &str) -> String {
    match (path, name) {
        ("", name) => name.to_owned(),
        (path, "") => path.to_owned(),
        (path, name) => format!("{path}.{name}"),
    }
}

/// A value as it can stand in a message.
pub(crate) fn show(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

pub(crate) fn noun(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a number with a fraction",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A name without the ways of writing it: replication_factor is replicationFactor.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// How many letters must be added, taken away, changed or swapped with their neighbour.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + changed);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in [("shards", "shards", 0), ("shrads", "shards", 1), ("shard", "shards", 1), ("", "abc", 3)] {
            assert_eq!(distance(a, b), d, "{a} {b}");
        }
    }

    /// Whoever adds a bound to the types must teach it to `within`.
    #[test]
    fn the_schema_has_only_keywords_that_are_checked_here() {
        fn walk(path: &str, s: &JSONSchemaProps) {
            let unknown = s.all_of.is_some()
                || s.any_of.is_some()
                || s.one_of.is_some()
                || s.not.is_some()
                || s.pattern.is_some()
                || s.min_length.is_some()
                || s.min_items.is_some()
                || s.max_items.is_some()
                || s.min_properties.is_some()
                || s.max_properties.is_some()
                || s.multiple_of.is_some()
                || s.exclusive_minimum.is_some()
                || s.exclusive_maximum.is_some();
            assert!(!unknown, "{path}");
            for (name, property) in s.properties.iter().flatten() {
                walk(&join(path, name), property);
            }
            if let Some(JSONSchemaPropsOrArray::Schema(items)) = &s.items {
                walk(&format!("{path}[]"), items);
            }
            if let Some(JSONSchemaPropsOrBool::Schema(values)) = &s.additional_properties {
                walk(&format!("{path}.*"), values);
            }
        }
        walk("", &crate::rules::RULES.as_ref().unwrap().root);
    }
}
