//! Reads Keyspaces from YAML as people write them, several documents in one
//! file, and says everything that is wrong with it at once.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Problem};
use crate::keyspace::{API_VERSION, KIND, Keyspace};
use crate::rules::validate;
use crate::schema::{distance, noun, show};

const DOCUMENT: &str = "must be a mapping with apiVersion, kind, metadata and spec";

/// Reads every Keyspace of a YAML text (JSON is YAML as well), with the defaults filled in.
/// `source` is what messages call it. A status in the text is dropped: it is not for people to say.
pub fn parse(text: &str, source: &str) -> Result<Vec<Keyspace>, Error> {
    let mut keyspaces = Vec::new();
    let mut problems = Vec::new();
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (i, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let number = i + 1;
        let value = match read(document) {
            Ok(Value::Null) => continue,
            Ok(value) => value,
            Err(found) => {
                problems.push(Problem {
                    document: Some(number),
                    found,
                    wanted: DOCUMENT.to_owned(),
                    ..Problem::default()
                });
                // What follows a document that isn't YAML can't be told apart from it.
                break;
            }
        };
        let name = value.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
        let mut found = Vec::new();
        if let Some(name) = &name
            && let Some(first) = names.insert(name.clone(), number)
        {
            found.push(Problem {
                field: "metadata.name".to_owned(),
                found: format!("is {name:?} again"),
                wanted: format!("document {first} has a keyspace of this name; give one of them another name"),
                ..Problem::default()
            });
        }
        match keyspace(value) {
            Ok(keyspace) => keyspaces.push(keyspace),
            Err(more) => found.extend(more),
        }
        problems.extend(found.into_iter().map(|p| Problem { document: Some(number), keyspace: name.clone(), ..p }));
    }
    if problems.is_empty() && keyspaces.is_empty() {
        problems.push(Problem {
            found: "holds no Keyspace".to_owned(),
            wanted: format!(
                "write at least one document with apiVersion: {API_VERSION}, kind: {KIND}, metadata.name, \
                 spec.shards and spec.replicationFactor"
            ),
            ..Problem::default()
        });
    }
    for problem in &mut problems {
        problem.source = Some(source.to_owned());
    }
    Error::unless_empty(problems).map(|()| keyspaces)
}

fn keyspace(mut value: Value) -> Result<Keyspace, Vec<Problem>> {
    let Some(object) = value.as_object_mut() else {
        return Err(vec![Problem {
            found: format!("is {}, {}", show(&value), noun(&value)),
            wanted: DOCUMENT.to_owned(),
            ..Problem::default()
        }]);
    };
    let header: Vec<Problem> =
        [("apiVersion", API_VERSION), ("kind", KIND)].iter().filter_map(|(f, k)| header(object, f, k)).collect();
    if !header.is_empty() {
        // The fields of another kind are none of ours.
        return Err(header);
    }
    object.remove("status");
    let problems = validate(&mut value, None);
    if problems.is_empty() {
        serde_json::from_value(value).map_err(|e| vec![Problem::unreadable("", &e)])
    } else {
        Err(problems)
    }
}

/// What is wrong with apiVersion or kind.
fn header(object: &Map<String, Value>, field: &str, known: &str) -> Option<Problem> {
    let (found, wanted) = match object.get(field) {
        Some(Value::String(value)) if value == known => return None,
        Some(Value::String(value)) if distance(&value.to_lowercase(), &known.to_lowercase()) <= 2 => {
            (format!("is {value:?}"), format!("did you mean {known}?"))
        }
        Some(value) => (format!("is {}", show(value)), format!("this version of vasto knows only {known}")),
        None => ("is missing".to_owned(), format!("must be {known}")),
    };
    Some(Problem { field: field.to_owned(), found, wanted, ..Problem::default() })
}

/// One document as JSON. A key that stands twice is an error, as is one that isn't a string.
fn read(document: serde_yaml::Deserializer<'_>) -> Result<Value, String> {
    let mut yaml = serde_yaml::Value::deserialize(document).map_err(|e| format!("can't be read as YAML ({e})"))?;
    yaml.apply_merge().map_err(|e| format!("has a wrong merge key ({e})"))?;
    to_json(yaml)
}

fn to_json(yaml: serde_yaml::Value) -> Result<Value, String> {
    use serde_yaml::Value as Yaml;
    Ok(match yaml {
        Yaml::Null => Value::Null,
        Yaml::Bool(b) => Value::Bool(b),
        Yaml::Number(n) => {
            let number = match (n.as_i64(), n.as_u64()) {
                (Some(i), _) => Some(i.into()),
                (_, Some(u)) => Some(u.into()),
                _ => n.as_f64().and_then(serde_json::Number::from_f64),
            };
            Value::Number(number.ok_or_else(|| format!("holds {n}, which is not a number that JSON knows"))?)
        }
        Yaml::String(s) => Value::String(s),
        Yaml::Sequence(items) => Value::Array(items.into_iter().map(to_json).collect::<Result<_, _>>()?),
        Yaml::Mapping(mapping) => {
            let mut object = Map::new();
            for (key, value) in mapping {
                let Yaml::String(key) = key else {
                    return Err(format!("has the key {}, which is not a string", show(&to_json(key)?)));
                };
                object.insert(key, to_json(value)?);
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => return Err(format!("has the tag {}, which means nothing here", tagged.tag)),
    })
}
